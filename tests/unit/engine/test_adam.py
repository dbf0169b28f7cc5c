import logging
import sys
import types

import pytest
import torch
from deepspeed.ops import op_builder

from megatron.config import OptimizerConfig
from megatron.engine import adam
from megatron.engine.adam import build_adam

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
    monkeypatch.setattr(adam, "_builds", lambda name: False)
    optimizer = build_adam(groups(), CONFIG, CPU, on_host=True)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay"]


class ApexAdam:
    def __init__(self, groups, **settings):
        self.groups, self.settings = groups, settings


@pytest.mark.parametrize("installed", [{"apex.optimizers", "amp_C"}, {"apex.optimizers"}, set()])
def test_on_a_gpu_apex_comes_after_deepspeed_if_it_is_whole(monkeypatch, installed):
    monkeypatch.setattr(adam, "_builds", lambda name: False)
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


def test_an_extension_that_does_not_build_is_said_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(op_builder, "CPUAdamBuilder", BrokenBuilder)
    with caplog.at_level(logging.INFO, logger="megatron"):
        assert not adam._builds("CPUAdamBuilder")
    assert caplog.messages == ["broken_adam does not build here (no compiler); Adam is another"]


@pytest.mark.parametrize("on_host", [False, True])
def test_a_learning_rate_set_on_the_groups_is_the_one_used(monkeypatch, on_host):
    monkeypatch.setattr(adam, "_builds", lambda name: False)
    parameter_groups = groups()
    optimizer = build_adam(parameter_groups, CONFIG, CPU, on_host)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.95), 1e-6)
        group["lr"] = 0.0
    parameter_groups[1]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter_groups[1]["params"][0], torch.tensor([1.0, -2.0, 3.0]))
