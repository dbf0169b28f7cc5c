"""Mixtures of experts: their products, the auxiliary loss of their routers, and what routing is independent of."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import Recompute
from megatron.core.parallel_state import ParallelState
from megatron.hf.building import build_hugging_face_model
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.experts import describe_experts
from megatron.hf.float64 import float64_stays
from megatron.hf.library import stream_model
from megatron.model.builder import Execution
from tests.unit.hf.test_model import EXECUTIONS, OFFLOADED, STREAMED
from tests.unit.hf.tiny_models import build, inputs, results, worst_error

COEFFICIENT = 0.7
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
RECOMPUTED = {
    **EXECUTIONS,
    "checkpointed": Execution(activation_checkpointing=True),
    "intervals": Execution(fpdt=True, chunk_size=9, slice_length=4, checkpoint_interval=2),
    "attention": Execution(
        fpdt=True, chunk_size=9, slice_length=4, checkpoint_interval=3, recompute=Recompute.ATTENTION
    ),
}


def balanced_loss(model, tokens, labels, mask, positions):
    """The summed token losses, and the auxiliary loss, as transformers defines it but not rounded to fp32."""
    out = model(input_ids=tokens, position_ids=positions, use_cache=False, output_router_logits=True)
    losses = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="none")
    p = torch.cat(out.router_logits).softmax(-1)
    chosen = p.topk(model.num_experts_per_tok).indices.flatten().bincount(minlength=p.shape[1]).double()
    auxiliary = p.shape[1] * (chosen * p.sum(0)).sum() / len(p) ** 2
    assert auxiliary.item() == pytest.approx(out.aux_loss.item(), rel=1e-6)
    return (losses * mask.flatten()).sum(), auxiliary


# Selections: top k of a softmax, a softmax of the top k, sigmoids with a bias, whose auxiliary loss counts others.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "minimax_m2"])
def test_gradients_include_that_of_the_auxiliary_loss_over_the_whole_batch(family):
    with float64_stays():
        model = build(family).train()
        loss, auxiliary = balanced_loss(model, *inputs())
        want = results(model, loss + COEFFICIENT * auxiliary * inputs()[2].sum())
        want["loss"] = loss.detach()
        for name, execution in RECOMPUTED.items():
            streamed = build_hugging_face_model(build(family, **BALANCED).train(), ParallelState(), execution)
            error, where = worst_error(results(streamed, streamed(*inputs())), want)
            assert error < 1e-12, (name, where)
            assert streamed.take_report()["router_aux_loss"] == pytest.approx(auxiliary.item(), rel=1e-12)


def test_the_library_balances_experts_beside_the_mean_loss():
    with float64_stays():
        model = build("mixtral").train()
        (loss, auxiliary), num_tokens = balanced_loss(model, *inputs()), inputs()[2].sum()
        want = results(model, loss / num_tokens + COEFFICIENT * auxiliary)
        want["loss"] = (loss / num_tokens).detach()
        streamed = stream_model(build("mixtral", **BALANCED).train(), chunk_size=7)
        error, where = worst_error(results(streamed, streamed(*inputs())), want)
        assert error < 1e-12, where


def test_without_the_setting_and_in_evaluation_nothing_is_balanced():
    model = build_hugging_face_model(build("mixtral").train(), ParallelState(), STREAMED)
    model(*inputs()).backward()
    report = model.take_report()
    assert report.keys() == {"expert_imbalance"}
    assert 1.0 <= report["expert_imbalance"] <= 6.0
    model.eval()(*inputs())
    assert not model.take_report()


def test_the_imbalance_is_that_of_the_worst_layer():
    model = build("mixtral").train()
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    model(input_ids=inputs()[0], position_ids=inputs()[3])
    loads = torch.stack([each.flatten().bincount(minlength=6) for each in chosen]).double()
    streamed = build_hugging_face_model(build("mixtral").train(), ParallelState(), OFFLOADED)
    streamed(*inputs())
    assert streamed.take_report()["expert_imbalance"] == pytest.approx(float((loads.amax(1) / loads.mean(1)).max()))


def test_a_loss_of_another_definition_is_refused(monkeypatch):
    model = build("mixtral", **BALANCED)
    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func", lambda *args: 1.0)
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM balances its experts by another loss"):
        build_hugging_face_model(model, ParallelState(), STREAMED)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "phimoe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_err_no_more_than_one_product_per_expert(family, dtype):
    """Against fp64: experts of every shape, some of which have no token."""
    experts = next(m for m in build(family).modules() if hasattr(m, "is_concatenated"))
    experts.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, experts.gate_up_proj.shape[1 if experts.is_transposed else 2], generator=generator)
    chosen = torch.rand(9, experts.num_experts - 2, generator=generator).topk(2).indices + 1
    weights = torch.rand(9, 2, generator=generator)

    def run(dtype, implementation):
        experts.config._experts_implementation = implementation
        experts.to(torch.bfloat16).to(dtype)
        leaf = x.bfloat16().to(dtype).requires_grad_()
        w = weights.bfloat16().to(dtype).requires_grad_()
        y = experts(leaf, chosen, w)
        return [y, *torch.autograd.grad((y * y.detach()).sum(), [leaf, w, *experts.parameters()])]

    build_hugging_face_model(build(family), ParallelState(), STREAMED)  # registers the implementation
    want = run(torch.float64, "eager")
    for ours, theirs, exact in zip(run(dtype, "fpdt"), run(dtype, "eager"), want, strict=True):
        scale = exact.norm()
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-6 * scale


def test_gradients_of_experts_are_summed_in_fp32_over_the_slices():
    """Many slices: the error of bf16 weights' gradients does not grow with their number."""
    long = partial(inputs, 96)
    reference = build("qwen3_moe").bfloat16().double()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with float64_stays():
        streamed = build_hugging_face_model(reference, ParallelState(), EXECUTIONS["plain"])
        want = results(streamed, streamed(*long()))[name]
    errors = []
    for slice_length in (96, 2):
        model = build("qwen3_moe").bfloat16()
        execution = Execution(fpdt=True, chunk_size=96, slice_length=slice_length)
        streamed = build_hugging_face_model(model, ParallelState(), execution)
        errors.append(float((results(streamed, streamed(*long()))[name] - want).norm() / want.norm()))
    assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_routing_does_not_depend_on_chunks_and_slices(family):
    chosen = []
    for chunk, slice_length in ((23, 23), (9, 4), (5, 2)):
        model = build(family, torch.float32)
        routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
        seen = [[] for _ in routers]
        for router, mine in zip(routers, seen, strict=True):
            router.register_forward_hook(lambda m, args, output, mine=mine: mine.append(output[2].sort(-1).values))
        execution = Execution(fpdt=True, chunk_size=chunk, slice_length=slice_length)
        streamed = build_hugging_face_model(model, ParallelState(), execution)
        with torch.no_grad():
            streamed(*inputs(batch=1))
        chosen.append(torch.stack([torch.cat(each) for each in seen]))
    assert all(torch.equal(chosen[0], each) for each in chosen[1:])


@pytest.mark.parametrize("jitter", [{"router_jitter_noise": 0.2}, {"router_jitter_noise": 0.0}])
@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_noise_of_routers_is_the_same_in_the_backward_pass(family, jitter):
    """PhiMoE draws its experts in training, with noise or without."""
    if family == "phimoe":
        jitter = jitter | {"input_jitter_noise": jitter["router_jitter_noise"]}
    runs = []
    for execution in (STREAMED, OFFLOADED):
        streamed = build_hugging_face_model(build(family, **jitter).train(), ParallelState(), execution)
        for _ in range(2):  # the first run finds out that random numbers are drawn
            torch.manual_seed(5)
            runs.append(results(streamed, streamed(*inputs())))
    assert all(worst_error(each, runs[0])[0] < 1e-12 for each in runs)


def test_biases_that_balance_without_a_loss_stay_as_they_are():
    model = build("glm4_moe")
    before = {name: b.clone() for name, b in model.named_buffers() if "e_score_correction_bias" in name}
    streamed = build_hugging_face_model(model.train(), ParallelState(), STREAMED)
    streamed(*inputs()).backward()
    after = dict(streamed.named_buffers())
    assert before
    assert all(torch.equal(after[name], value) and not after[name].requires_grad for name, value in before.items())


def test_the_log_says_how_experts_run():
    cpu = torch.device("cpu")
    assert describe_experts(build("llama"), cpu, torch.float32) == ""
    assert describe_experts(nn.Linear(2, 2), cpu, torch.float32) == ""
    assert "one product per expert" in describe_experts(build("mixtral"), cpu, torch.bfloat16)
