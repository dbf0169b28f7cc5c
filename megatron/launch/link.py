"""Measurement of the link between the GPUs and the memory of their host, with all ranks copying at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config import Config
from megatron.core.link_rates import LinkRates
from megatron.initialize import Context

# Pinning memory takes 0.3 s/GiB or more, so the same buffers are copied several times.
BUFFER_BYTES = 64 * 2**20
COPIES = 8


def with_measured_link(config: Config, context: Context) -> Context:
    """Return the context with the rates of the link if chunks go through it. Collective over all ranks."""
    if context.device.type != "cuda" or not config.parallel.ds_sequence_parallel_fpdt_offloading:
        return context
    context.watchdog.enter("measuring the link to the host")
    return replace(context, link=measure_link(context.device))


def measure_link(device: torch.device) -> LinkRates:
    """Measure the rates of the slowest rank, in 0.2 s or so. Collective over all ranks."""
    on_host = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_gpu = [torch.empty_like(each, device=device) for each in on_host]
    to_gpu = _Lane(on_gpu[0], on_host[0], torch.cuda.Stream(device))
    to_host = _Lane(on_host[1], on_gpu[1], torch.cuda.Stream(device))
    rates = [_gbps(lanes, device) for lanes in ([to_gpu], [to_host], [to_gpu, to_host])]
    slowest = torch.tensor(rates, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MIN)
    return LinkRates(*slowest.tolist())


@dataclass(frozen=True)
class _Lane:
    """One direction of the link."""

    target: Tensor
    source: Tensor
    stream: torch.cuda.Stream


def _gbps(lanes: Sequence[_Lane], device: torch.device) -> float:
    """Return the rate of this rank over all lanes, which run at once on all ranks."""
    _seconds(lanes, device)  # warms up, and lets all ranks begin the timed copies at the same time
    return len(lanes) * COPIES * BUFFER_BYTES / _seconds(lanes, device) / 1e9


def _seconds(lanes: Sequence[_Lane], device: torch.device) -> float:
    current = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize(device)
    start.record(current)
    for lane in lanes:
        lane.stream.wait_event(start)
    for _ in range(COPIES):
        for lane in lanes:
            with torch.cuda.stream(lane.stream):
                lane.target.copy_(lane.source, non_blocking=True)
    for lane in lanes:
        current.wait_stream(lane.stream)
    end.record(current)
    end.synchronize()
    return start.elapsed_time(end) / 1e3
