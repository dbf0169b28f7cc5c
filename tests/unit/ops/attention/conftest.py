import sys

import pytest
import torch

from megatron.ops.attention import flash_attn_packages
from tests.unit.ops.attention.fake_flash_attn import INSTALLED, module

PACKAGES = (flash_attn_packages.FLASH_ATTN_2, flash_attn_packages.FLASH_ATTN_3, flash_attn_packages.FLASH_ATTN_4)


@pytest.fixture(autouse=True)
def no_package_installed(monkeypatch):
    """Hide what this machine has, and forget what was imported."""
    for name in ("flash_attn", *(name for package in PACKAGES for name in package.modules)):
        monkeypatch.setitem(sys.modules, name, None)
    flash_attn_packages.load.cache_clear()
    yield
    flash_attn_packages.load.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Install the stand-in of one version; return the name of its backend."""

    def install(version):
        backend, name, functions = INSTALLED[version]
        monkeypatch.setitem(sys.modules, name, module(name, version, **functions))
        if name.startswith("flash_attn."):
            monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn", version))
        flash_attn_packages.load.cache_clear()
        return backend

    return install


@pytest.fixture
def folder_of_packages(monkeypatch, tmp_path):
    """A folder to import from, in place of the packages of this machine."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("flash_attn", "flash_attn_3", "flash_attn_interface"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def capability(monkeypatch):
    """Pretend that CUDA device 0 is there; set its capability with the value returned."""
    current = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: current[0])
    return current
