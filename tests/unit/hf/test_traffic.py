"""The memory traffic of experts, as it is counted, beside that of their kernels."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.hf.experts import run_experts
from megatron.hf.traffic import expert_traffic
from tests.unit.hf.tiny_models import build

HIDDEN, NUM_TOKENS, CHOSEN = 256, 64, 2


class Kernels(TorchDispatchMode):
    """Counts the elements that kernels other than products read and write."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "_mm" not in str(func):
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
            if "index.Tensor" in str(func):  # reads no more rows than it writes
                tensors = [result, result]
            self.elements += sum(tensor.numel() for tensor in tensors)
        return result


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_counted_traffic_is_that_of_the_kernels(family):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "moe_intermediate_size": 96}
    experts = next(m for m in build(family, torch.float32, **sizes).modules() if hasattr(m, "is_concatenated"))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).requires_grad_()
    chosen = torch.rand(NUM_TOKENS, experts.num_experts, generator=generator).topk(CHOSEN).indices
    weights = torch.rand(NUM_TOKENS, CHOSEN, generator=generator).requires_grad_()
    with Kernels() as forward:
        y = run_experts(experts, x, chosen, weights)
    dy = torch.ones_like(y)
    with Kernels() as backward:
        torch.autograd.grad(y, [x, weights, *experts.parameters()], dy)
    counted = NUM_TOKENS * expert_traffic(experts.to("meta"), HIDDEN, CHOSEN)
    assert counted == pytest.approx(2 * forward.elements + backward.elements, rel=0.1)
