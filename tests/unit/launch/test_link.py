"""The link to the host is measured where chunks go through it; tests/gpu/test_link.py measures it."""

from types import SimpleNamespace

import pytest
import torch

from megatron.launch.link import with_measured_link
from tests.unit.launch.test_execution import LLAMA_8B, parse_args


@pytest.mark.parametrize(
    "device, flags",
    [("cpu", LLAMA_8B), ("cuda", [flag for flag in LLAMA_8B if flag != "--ds-sequence-parallel-fpdt-offloading"])],
)
def test_without_copies_to_a_gpu_nothing_is_measured(device, flags):
    context = SimpleNamespace(device=torch.device(device))
    assert with_measured_link(parse_args(flags), context) is context
