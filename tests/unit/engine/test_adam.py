import logging
import os
import sys
import types

import pytest
import torch
from deepspeed.ops import op_builder
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
from torch.utils import cpp_extension

from megatron.config import OptimizerConfig
from megatron.engine import adam
from megatron.engine.adam import build_adam

ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
CPU = torch.device("cpu")
CONFIG = OptimizerConfig(lr=0.01, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6)


def groups():
    decayed, kept = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    return [
        {"name": "decay", "params": [decayed], "weight_decay": 0.1},
        {"name": "no_decay", "params": [kept], "weight_decay": 0.0},
    ]


def stepped(value, gradients, weight_decay):
    """AdamW (arXiv 1711.05101) written out, in fp64."""
    value, first, second = value.double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        value = value * (1 - 0.01 * weight_decay)
        value = value - 0.01 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
    return value


def test_steps_are_adamw_with_the_configured_constants_and_each_group_s_decay():
    parameter_groups = groups()
    optimizer = build_adam(parameter_groups, CONFIG, CPU, on_host=False)
    gradients = [torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-0.1, 0.3, 4.0]), torch.tensor([1.0, 1.0, 1.0])]
    for gradient in gradients:
        for group in parameter_groups:
            group["params"][0].grad = gradient.clone()
        optimizer.step()
    for group in parameter_groups:
        want = stepped(torch.tensor([1.0, -2.0, 3.0]), gradients, group["weight_decay"])
        torch.testing.assert_close(group["params"][0].detach().double(), want, rtol=1e-6, atol=1e-7)


def test_on_a_cpu_adam_is_torch_s():
    assert type(build_adam(groups(), CONFIG, CPU, on_host=False)) is torch.optim.AdamW


def test_where_deepspeed_s_host_adam_does_not_build_adam_is_torch_s(monkeypatch):
    monkeypatch.setattr(adam, "_builds", lambda *_: False)
    optimizer = build_adam(groups(), CONFIG, CPU, on_host=True)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay"]


class ApexAdam:
    def __init__(self, groups, **settings):
        self.groups, self.settings = groups, settings


@pytest.mark.parametrize("installed", [{"apex.optimizers", "amp_C"}, {"apex.optimizers"}, set()])
def test_on_a_gpu_apex_comes_after_deepspeed_if_it_is_whole(monkeypatch, installed):
    monkeypatch.setattr(adam, "_builds", lambda *_: False)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **settings: "torch's")
    for name in ("apex", "apex.optimizers", "amp_C"):
        module = types.ModuleType(name) if any(each.startswith(name) for each in installed) else None
        monkeypatch.setitem(sys.modules, name, module)
    if "apex.optimizers" in installed:
        sys.modules["apex.optimizers"].FusedAdam = ApexAdam
    optimizer = build_adam(groups(), CONFIG, torch.device("cuda"), on_host=False)
    if "amp_C" in installed:
        assert optimizer.settings == {"adam_w_mode": True, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
        assert [group["weight_decay"] for group in optimizer.groups] == [0.1, 0.0]
    else:
        assert optimizer == "torch's"


class BrokenBuilder:
    name = "broken_adam"

    def load(self, verbose):
        raise RuntimeError("no compiler\nand a long story")


@pytest.mark.parametrize(
    "builder, on_host, message",
    [
        ("CPUAdamBuilder", True, "DeepSpeed's broken_adam does not build here (no compiler); Adam is torch's AdamW"),
        (
            "FusedAdamBuilder",
            False,
            "DeepSpeed's broken_adam does not build here (no compiler); Adam is torch's fused AdamW",
        ),
    ],
)
def test_an_extension_that_does_not_build_is_logged_with_its_substitute(monkeypatch, caplog, builder, on_host, message):
    monkeypatch.setattr(op_builder, builder, BrokenBuilder)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **settings: settings["fused"])
    with caplog.at_level(logging.INFO, logger="megatron"):
        assert build_adam(groups(), CONFIG, torch.device("cuda"), on_host) is not on_host
    assert caplog.messages == [message]


@pytest.mark.parametrize(
    "stated, built_for",
    [
        ("9.0a", "9.0+PTX"),
        ("8.0 9.0a+PTX", "8.0;9.0+PTX"),
        ("8.6;10.0f;12.1a", "8.6;10.0;12.1+PTX"),
        ("8.0;9.0+PTX", "8.0;9.0+PTX"),
        (None, "9.0+PTX"),
    ],
)
def test_deepspeed_s_adam_builds_for_the_listed_architectures_with_letters_or_without(monkeypatch, stated, built_for):
    """Run DeepSpeed's whole path to torch's compiler, which reads the architectures from the environment."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(cpp_extension, "load", lambda **_: seen.append(os.environ[ARCHITECTURES]))
    monkeypatch.setattr(cpp_extension, "verify_ninja_availability", lambda: None)
    monkeypatch.setattr(op_builder, "FusedAdamBuilder", FusedAdamBuilder)  # a machine without GPUs has another
    monkeypatch.setattr(FusedAdamBuilder, "is_compatible", lambda *_: True)
    monkeypatch.setattr(FusedAdamBuilder, "is_rocm_pytorch", staticmethod(lambda: False))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.delenv(ARCHITECTURES, raising=False)
    if stated is not None:
        monkeypatch.setenv(ARCHITECTURES, stated)
    assert adam._builds("FusedAdamBuilder", "torch's fused AdamW")
    assert (seen, os.environ.get(ARCHITECTURES)) == ([built_for], stated)


@pytest.mark.parametrize("on_host", [False, True])
def test_a_learning_rate_set_on_the_groups_is_the_one_used(monkeypatch, on_host):
    monkeypatch.setattr(adam, "_builds", lambda *_: False)
    parameter_groups = groups()
    optimizer = build_adam(parameter_groups, CONFIG, CPU, on_host)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.95), 1e-6)
        group["lr"] = 0.0
    parameter_groups[1]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter_groups[1]["params"][0], torch.tensor([1.0, -2.0, 3.0]))
