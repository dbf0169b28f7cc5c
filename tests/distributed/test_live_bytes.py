"""The memory meter: what it counts, for how long, and what it leaves out."""

import torch

from tests.distributed.live_bytes import LiveBytesMeter

KIB = 128  # float64 elements


def test_a_tensor_counts_while_it_lives() -> None:
    with LiveBytesMeter() as meter:
        x = torch.zeros(KIB, dtype=torch.float64)
        y = x + 1
        assert meter.current_bytes == 2048
        del x
        assert meter.current_bytes == 1024
        del y
    assert meter.current_bytes == 0
    assert meter.peak_bytes == 2048


def test_views_and_in_place_results_count_once() -> None:
    with LiveBytesMeter() as meter:
        x = torch.zeros(KIB, dtype=torch.float64)
        view = x.view(2, -1)[0]
        view.add_(1)
        del x
        assert meter.current_bytes == 1024
    assert meter.peak_bytes == 1024


def test_what_autograd_keeps_for_the_backward_pass_counts() -> None:
    weight = torch.ones(KIB, dtype=torch.float64, requires_grad=True)
    with LiveBytesMeter(known=[weight]) as meter:
        y = (weight.exp() * 2).sum()  # the result of exp is kept, the product is not
        kept = meter.current_bytes
        y.backward()
        del y
    assert kept == 1024 + 8
    assert meter.current_bytes == 1024  # the gradient


def test_memory_that_came_from_outside_torch_counts_when_used() -> None:
    buffer = bytearray(4096)
    with LiveBytesMeter() as meter:
        outside = torch.frombuffer(buffer, dtype=torch.uint8)
        outside.add(0)
        assert meter.current_bytes == 4096


def test_known_tensors_and_the_host_tier_do_not_count() -> None:
    known, host = torch.zeros(KIB), torch.zeros(KIB)
    with LiveBytesMeter([known], lambda tensor: tensor.data_ptr() == host.data_ptr()) as meter:
        known.add_(1)
        host.copy_(known)
    assert meter.peak_bytes == 0
