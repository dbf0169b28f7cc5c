from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from megatron.hf.materialization import empty_model, materialize
from megatron.model.initialization import Initialization
from tests.unit.hf.tiny_models import config_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen3_moe", "deepseek_v3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_tensors_and_the_initial_values_that_transformers_builds(family, dtype):
    model = empty_model(config_of(family), dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    materialize(model, Initialization(dtype, CPU, seed=3), random=True)
    torch.manual_seed(3)
    want = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    for got, expected in ((model.named_parameters(), want.named_parameters()), (model.state_dict(), want.state_dict())):
        got, expected = dict(got), dict(expected)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype) or "correction" in name
            spread, wanted = (float(t.float().std(correction=0)) for t in (got[name], tensor))
            assert spread == pytest.approx(wanted, rel=0.25), name
    for (name, got), (_, expected) in zip(model.named_buffers(), want.named_buffers(), strict=True):
        assert torch.equal(got.float(), expected.float()), name
    again = empty_model(config_of(family), dtype)
    materialize(again, Initialization(dtype, CPU, seed=3), random=True)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))


class LargestOnHost(TorchFunctionMode):
    """Notes the elements of the largest tensor with memory."""

    elements = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "llama4_text", "deepseek_v3"])
def test_an_empty_model_has_no_memory_for_its_matrices(family):
    with LargestOnHost() as largest:
        model = empty_model(config_of(family), torch.float32)
    assert 0 < largest.elements < model.get_input_embeddings().weight.numel()
