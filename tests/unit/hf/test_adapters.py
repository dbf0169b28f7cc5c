"""Adapters of peft on streamed models: gradients are those of transformers' own run, and frozen weights have none."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config import AdaptersConfig, ConfigError, Recompute
from megatron.core.parallel_state import ParallelState
from megatron.hf.adapters import add_adapters, is_of_adapter
from megatron.hf.building import build_hugging_face_model
from megatron.hf.float64 import float64_stays
from megatron.hf.library import stream_model
from megatron.model.builder import Execution
from tests.unit.hf.tiny_models import build, eager_loss, inputs, worst_error

EXECUTIONS = {
    "plain": Execution(),
    "streamed": Execution(fpdt=True, chunk_size=9, slice_length=4),
    "saved products": Execution(fpdt=True, chunk_size=9, slice_length=4, offloading=True, recompute=Recompute.NONE),
    "one slice": Execution(fpdt=True, chunk_size=9, offloading=True, recompute=Recompute.NONE),
}
LORA = AdaptersConfig(lora_rank=2)
DORA = AdaptersConfig(lora_rank=3, lora_alpha=4.0, use_dora=True)
EXPERTS = ("q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj")
CASES = {
    "llama": ("llama", LORA),
    "llama-tied-dora": ("llama-tied", DORA),
    "llama-some": ("llama", AdaptersConfig(lora_rank=4, lora_target_modules=("v_proj", "down_proj"))),
    "gpt2": ("gpt2", LORA),
    "gpt_neox-dora": ("gpt_neox", DORA),
    "qwen3": ("qwen3", LORA),
    "deepseek_v3": ("deepseek_v3", LORA),
    "gpt_oss-experts": ("gpt_oss", AdaptersConfig(lora_rank=2, lora_target_modules=("all-linear", *EXPERTS[2:]))),
    "gemma3-dora": ("gemma3_text", DORA),
    "qwen3_moe-experts": ("qwen3_moe", AdaptersConfig(lora_rank=2, lora_target_modules=EXPERTS)),
}


def adapted(family, settings, **changes):
    """A model with adapters of random weights, the same for every call."""
    model = build(family, **changes)
    add_adapters(model, settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == is_of_adapter(name)
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator).double()
                parameter.copy_(0.5 * values if parameter.ndim > 1 else 1.0 + 0.3 * values)
    return model.double()


def results(model, loss):
    model.zero_grad()
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in trained.items()}}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_adapters_are_those_of_peft(case):
    with float64_stays():
        model = adapted(*CASES[case])
        want = results(model, eager_loss(model, *inputs()))
        for name, execution in EXECUTIONS.items():
            streamed = build_hugging_face_model(adapted(*CASES[case]), ParallelState(), execution)
            error, where = worst_error(results(streamed, streamed(*inputs())), want)
            assert error < 1e-10, (name, where)  # large adapters magnify rounding


class _Products(TorchDispatchMode):
    """The shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
def test_no_product_of_a_frozen_weights_gradient_is_run(execution):
    streamed = build_hugging_face_model(adapted("llama", LORA), ParallelState(), execution)
    with _Products() as products:
        streamed(*inputs()).backward()
    trained = {tuple(p.shape) for p in streamed.parameters() if p.requires_grad}
    frozen = {shape for p in streamed.parameters() if not p.requires_grad for shape in (p.shape, p.shape[::-1])}
    assert products.shapes & trained == trained
    assert not products.shapes & frozen


def test_all_linear_is_every_linear_layer_that_peft_can_adapt():
    names = {name for name, p in adapted("llama", LORA).named_parameters() if p.requires_grad}
    layer = {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")}
    assert layer == {
        f"{part}.lora_{which}.default.weight"
        for part in (
            *(f"self_attn.{each}_proj" for each in "qkvo"),
            *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
        )
        for which in "AB"
    }
    assert len(names) == 3 * len(layer)
    assert not any("mlp" in n for n, p in adapted("deepseek_v3", LORA).named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("llama", {"lora_target_modules": ("qqq",)}, r"\(qqq\) names nothing.*self_attn.q_proj"),
        ("llama", {"lora_target_modules": ("lm_head",)}, r"\(lm_head\) names nothing"),
        ("qwen3_moe", {"lora_target_modules": EXPERTS, "lora_dropout": 0.1}, "lora_dropout"),
        ("qwen3_moe", {"lora_target_modules": EXPERTS, "use_dora": True}, "use_dora"),
        ("deepseek_v3", {"lora_target_modules": ("up_proj",)}, "means the experts to peft"),
    ],
)
def test_adapters_that_the_model_cannot_have_are_refused(family, settings, message):
    with pytest.raises(ConfigError, match=message):
        add_adapters(build(family), AdaptersConfig(lora_rank=2, **settings))


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
def test_dropout_of_adapters_draws_the_same_numbers_in_the_backward_pass(execution):
    settings = AdaptersConfig(lora_rank=2, lora_dropout=0.3)
    streamed = build_hugging_face_model(adapted("llama", settings).train(), ParallelState(), execution)
    trained = [p for p in streamed.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in trained]

    def loss_at(step):
        torch.manual_seed(5)
        with torch.no_grad():
            for p, d in zip(trained, directions, strict=True):
                p.add_(step * d)
        return streamed(*inputs())

    with float64_stays():
        gradients = torch.autograd.grad(loss_at(0.0), trained)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        up, down = float(loss_at(1e-7).detach()), float(loss_at(-2e-7).detach())
        assert (up - down) / 2e-7 == pytest.approx(slope, rel=1e-5)
        assert up != pytest.approx(float(streamed.eval()(*inputs()).detach()), rel=1e-3)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_librarys_user_may_add_adapters(use_dora):
    settings = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], use_dora=use_dora, init_lora_weights=False)
    trained = []
    with float64_stays():
        for stream in (False, True):
            torch.manual_seed(3)
            model = get_peft_model(build("llama"), settings).double().train()
            tokens, labels, mask, positions = inputs()
            if stream:
                streamed = stream_model(model, chunk_size=7)
                loss = streamed(tokens, labels, mask) * mask.sum()
            else:
                loss = eager_loss(model, tokens, labels, mask, positions)
            trained.append(results(model, loss))
    error, where = worst_error(trained[1], trained[0])
    assert error < 1e-12, where
