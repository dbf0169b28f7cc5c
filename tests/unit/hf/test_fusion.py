from functools import partial

import pytest

from megatron.hf.fusion import fuse_modules
from tests.unit.hf.tiny_models import build


@pytest.mark.parametrize(
    "family, norms, mlps",
    [
        ("llama", 7, 3),
        ("qwen3", 13, 3),  # with the norms of queries and keys
        ("deepseek_v3", 13, 3),  # the MLP of the dense layer, and the shared experts
        ("gpt_oss", 7, 0),
        ("gemma3_text", 0, 0),  # its norms multiply by 1 + weight, and it is gated by GELU
        ("gpt2", 0, 0),
        ("cohere2", 0, 3),
    ],
)
def test_modules_that_compute_a_fused_formula_are_fused(family, norms, mlps):
    model = build(family).train()
    fuse_modules(model)
    fused = [m.forward.func.__name__ for m in model.modules() if isinstance(m.__dict__.get("forward"), partial)]
    assert (fused.count("_rms_norm"), fused.count("_gated_mlp")) == (norms, mlps)
    assert all(module.training for module in model.modules())
