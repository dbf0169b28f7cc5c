"""Transformers models as streams on a GPU: the error is that of transformers, and the host never waits."""

import pytest
import torch

from megatron.core.parallel_state import ParallelState
from megatron.hf.building import build_hugging_face_model
from megatron.model.builder import Execution
from tests.unit.hf.families import VOCAB, build, eager_loss, results

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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_never_waits_for_the_gpu(family):
    model = build(family, torch.bfloat16, **FAMILIES[family]).cuda().train()
    streamed = build_hugging_face_model(model, ParallelState(), STREAMED)
    batch = [t.pin_memory() for t in inputs()]
    with torch.autograd.set_multithreading_enabled(False):
        streamed(*batch).backward()  # compiles kernels and allocates host buffers
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            streamed(*batch).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
