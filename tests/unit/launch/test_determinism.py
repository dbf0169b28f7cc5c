"""What --deterministic-mode sets, and what it refuses."""

import os

import pytest
import torch

from megatron.config import ConfigError
from megatron.launch.determinism import VARIABLES, use_deterministic_kernels
from megatron.model.layers import attention_request
from tests.unit.model.small_model import small_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Run without the variables, and leave torch as it was."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is unset again afterwards
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_the_libraries_are_told_on_a_gpu():
    use_deterministic_kernels("cuda")
    assert {name: os.environ[name] for name in VARIABLES} == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_NVLS_ENABLE": "0",
    }


def test_torch_is_told_everywhere_and_memory_is_not_filled():
    assert not attention_request(small_config(), CPU, torch.float32).deterministic
    use_deterministic_kernels("cpu")
    assert not any(name in os.environ for name in VARIABLES)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert attention_request(small_config(), CPU, torch.float32).deterministic


def test_a_smaller_workspace_of_cublas_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_kernels("cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    "name, value, allowed",
    [("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8", ":4096:8 or :16:8"), ("NCCL_NVLS_ENABLE", "1", "0")],
)
def test_an_environment_that_says_otherwise_is_refused(monkeypatch, name, value, allowed):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        use_deterministic_kernels("cuda")
    assert str(error.value) == (
        f"the environment's {name} ({value}) must be {allowed} with --deterministic-mode; change it, or unset it"
    )
    assert not torch.are_deterministic_algorithms_enabled()
