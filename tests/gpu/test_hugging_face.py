"""Transformers models as streams on a GPU: the error is that of transformers, and the host never waits."""

import pytest
import torch

from megatron.core.parallel_state import ParallelState
from megatron.hf.building import build_hugging_face_model
from megatron.hf.experts import run_experts
from megatron.model.builder import Execution
from tests.gpu.waits import no_waits
from tests.unit.hf.tiny_models import VOCAB, build, eager_loss, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LENGTH = 1024
# Wide enough for the kernels.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": LENGTH}
STREAMED = Execution(fpdt=True, chunk_size=384, slice_length=256, offloading=True)
FAMILIES = {
    "llama": WIDE,
    "qwen3": WIDE,
    "gemma2": {**WIDE, "sliding_window": 300},
    "gpt2": {"n_embd": 256, "n_positions": LENGTH, "max_position_embeddings": LENGTH},
}

# In bf16 some tokens get other experts, so these are not compared.
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.01, "moe_intermediate_size": 128}
EXPERTS = {"qwen3_moe": {**WIDE, **BALANCED}, "gpt_oss": {**WIDE, **BALANCED}, "deepseek_v3": {**WIDE, "head_dim": 4}}


def inputs():
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(3, VOCAB, (2, 1, LENGTH), generator=generator)
    return tokens, labels, torch.ones(1, LENGTH), torch.arange(LENGTH)[None].clone()


def streamed_results(family):
    model = build(family, torch.bfloat16, **FAMILIES[family]).cuda().eval()
    streamed = build_hugging_face_model(model, ParallelState(), STREAMED)
    return results(streamed, streamed(*(t.pin_memory() for t in inputs())))


def eager_results(family, dtype):
    model = build(family, dtype, **FAMILIES[family]).cuda().eval()
    return results(model, eager_loss(model, *(t.cuda() for t in inputs())))


def error(got, want):
    return sum(float((got[n].double() - w).norm() / w.norm().clamp_min(1e-6)) for n, w in want.items()) / len(want)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_errs_no_more_than_transformers(family):
    want = {name: value.double() for name, value in eager_results(family, torch.float32).items()}
    assert error(streamed_results(family), want) <= 1.2 * error(eager_results(family, torch.bfloat16), want)


@pytest.mark.parametrize("family", FAMILIES | EXPERTS)
def test_the_host_never_waits_for_the_gpu(family):
    model = build(family, torch.bfloat16, **(FAMILIES | EXPERTS)[family]).cuda().train()
    streamed = build_hugging_face_model(model, ParallelState(), STREAMED)
    batch = [t.pin_memory() for t in inputs()]
    with torch.autograd.set_multithreading_enabled(False):
        streamed(*batch).backward()  # compiles kernels and allocates host buffers
        with no_waits():
            streamed(*batch).backward()


def test_grouped_experts_err_no_more_than_one_product_per_expert():
    experts = next(m for m in build("gpt_oss", **WIDE).modules() if hasattr(m, "is_concatenated")).cuda()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 256, generator=generator).cuda().bfloat16()
    chosen = (torch.rand(200, experts.num_experts - 1, generator=generator).topk(2).indices + 1).cuda()
    weights = torch.rand(200, 2, generator=generator).cuda().bfloat16()

    def run(dtype, function):
        experts.to(torch.bfloat16).to(dtype)
        leaves = [x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
        y = function(experts, leaves[0], chosen, leaves[1])
        gradients = torch.autograd.grad(y.float().square().sum(), [*leaves, *experts.parameters()])
        return dict(enumerate((y.detach(), *gradients)))

    experts.config._experts_implementation = "eager"
    eager = type(experts).forward
    want = run(torch.float64, eager)
    assert error(run(torch.bfloat16, run_experts), want) <= 1.2 * error(run(torch.bfloat16, eager), want)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_qlora_is_lora_on_the_dequantized_weights_and_the_host_never_waits(family):
    pytest.importorskip("bitsandbytes")
    from tests.unit.hf.test_adapters import LORA, adapted
    from tests.unit.hf.test_quantization import quantized, rounded

    outcomes = []
    for change in (rounded, quantized):
        model = change(adapted(family, LORA, **WIDE, moe_intermediate_size=128).bfloat16().cuda())
        streamed = build_hugging_face_model(model, ParallelState(), STREAMED)
        batch = [t.pin_memory() for t in inputs()]
        with torch.autograd.set_multithreading_enabled(False):
            streamed(*batch).backward()
            model.zero_grad()
            with no_waits():
                loss = streamed(*batch)
                loss.backward()
        outcomes.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
    want, got = outcomes
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-2, atol=2e-2 * float(value.abs().max()), msg=name)
