"""The plan of a job on machines: whether it fits, and the time of a step and of a whole training run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megatron.fpdt.memory_model import lowest_memory
from megatron.planner.hardware import GIB, TERA, Machines
from megatron.planner.job import Job
from megatron.planner.memory import Memory, memory_of
from megatron.planner.speed import Speed, speed_of

GRANULE = 1024  # tokens per rank; the longest context is rounded down to a multiple
CHUNKS = [2**exponent for exponent in range(12, 20)]  # chunk sizes to try, in tokens per rank


@dataclass(frozen=True)
class Plan:
    """A job on machines, with the estimates of its memory and speed."""

    job: Job
    machines: Machines
    backend: str

    @cached_property
    def memory(self) -> Memory:
        return memory_of(self.job, self.machines, self.backend)

    @cached_property
    def speed(self) -> Speed:
        memory = self.memory
        how = memory.recompute, memory.checkpoint_interval, memory.disk_share
        return speed_of(self.job, self.machines, self.backend, *how)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.job.global_tokens / self.speed.step / self.job.num_gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs (causal attention once, no recomputation) over the GPUs' dense peak."""
        peak = self.job.num_gpus * self.machines.gpu.peak_tflops * TERA
        return self.speed.model_flops / self.speed.step / peak

    def training_steps(self, num_tokens: int) -> int:
        """Return the optimizer steps that train on so many tokens, the last one whole."""
        return -(-num_tokens // self.job.global_tokens)

    @property
    def fits_gpu(self) -> bool:
        return self.memory.gpu_with_overhead <= self.machines.gpu.memory_gib * GIB

    @property
    def fits_host(self) -> bool:
        return self.memory.host <= self.machines.host_bytes_per_gpu

    @property
    def fits(self) -> bool:
        return self.fits_gpu and self.fits_host

    @property
    def overlaps_with_link(self) -> bool:
        """Whether copies to and from the host are hidden behind compute."""
        return self.speed.waiting_for_link == 0

    def with_job(self, job: Job) -> Plan:
        """Return the plan of another job with the same machines and kernel."""
        return replace(self, job=job)

    def lowest_memory(self) -> Plan:
        """Return the plan that saves the least on the host."""
        recompute, interval = lowest_memory(self.job.shape, self.job.device_memory_bytes)
        return self.with_job(replace(self.job, recompute=recompute, checkpoint_interval=interval))

    def smallest_hiding_chunk(self) -> int | None:
        """Return the smallest power-of-two chunk per rank whose copies are hidden behind compute, or None."""
        return next((plan.job.chunk_length for plan in self.with_chunks() if plan.overlaps_with_link), None)

    def with_chunks(self) -> Iterator[Plan]:
        """Yield the plans of all chunk sizes to choose from, the smallest first; without FPDT only this plan."""
        length = self.job.model.seq_length
        if not self.job.streamed:
            yield self
            return
        for tokens in CHUNKS:
            chunk = tokens * self.job.sequence_parallel_size
            yield self.with_job(replace(self.job, chunk_length=min(chunk, length)))
            if chunk >= length:
                return
