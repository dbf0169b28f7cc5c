"""The plan of a job on machines: whether it fits, the time of a step, the best chunk size and advice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megatron.fpdt.memory_model import lowest_memory
from megatron.planner.hardware import GIB, TERA, Machines
from megatron.planner.job import Job
from megatron.planner.memory import FRAGMENTATION, Memory, memory_of
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
        return speed_of(self.job, self.machines, self.backend, memory.recompute, memory.checkpoint_interval)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.job.global_tokens / self.speed.step / self.job.num_gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs (causal attention once, no recomputation) over the GPUs' dense peak."""
        peak = self.job.num_gpus * self.machines.gpu.peak_tflops * TERA
        return self.speed.model_flops / self.speed.step / peak

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

    def longest_context(self) -> int:
        """Return the tokens of the longest sequence that fits, 0 where none does."""
        step = GRANULE * self.job.sequence_parallel_size
        low, high = 0, 1
        while self.with_job(self.job.at(high * step)).fits:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.with_job(self.job.at(middle * step)).fits else (low, middle)
        return low * step

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

    def advice(self) -> list[str]:
        """Return what to change where the job does not fit, the most helpful line first."""
        if self.fits:
            return []
        job, lines = self.job, []
        if not job.streamed:
            lines += self._if_it_fits(
                replace(job, streamed=True, chunk_length=min(32768 * job.sequence_parallel_size, job.model.seq_length)),
                "--ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-offloading fits the GPU",
            )
        elif not self.fits_gpu:
            smaller = [plan.job.chunk_length for plan in self.with_chunks() if plan.fits_gpu]
            if smaller:
                lines.append(f"--ds-sequence-parallel-fpdt-chunk-size {smaller[-1]} fits the GPU")
        if not self.fits_gpu:
            if job.zero_stage < 3:
                lines += self._if_it_fits(replace(job, zero_stage=3), "--zero-stage 3 fits the GPU")
            if not job.cpu_optimizer:
                lines += self._if_it_fits(replace(job, cpu_optimizer=True), "--cpu-optimizer fits the GPU")
        lines += self._with_less_saved()
        lines += self._with_chunks_on_the_gpu()
        longest = self.longest_context()
        if longest:
            lines.append(f"--seq-length {longest} is the longest that fits")
        if not self.fits_host:
            lines.append(f"{self._host_memory_per_machine()}, or more GPUs on more machines, would suffice")
        if not self.fits_gpu:
            lines.append("more GPUs, or GPUs with more memory")
        return lines

    def _with_less_saved(self) -> list[str]:
        """Return a line of advice where the host is too small for what the job says is saved, and not for the least."""
        chosen = self.with_job(replace(self.job, recompute=None, checkpoint_interval=None))
        if not self.job.streamed or self.fits_host or not chosen.fits_host:
            return []
        recompute = f"--ds-sequence-parallel-fpdt-recompute {chosen.memory.recompute}"
        interval = f"--ds-sequence-parallel-fpdt-checkpoint-interval {chosen.memory.checkpoint_interval}"
        return [f"{recompute} {interval} fits the host"]

    def _with_chunks_on_the_gpu(self) -> list[str]:
        """Return a line of advice where the host is too small and the GPU has room for the rest."""
        job = self.job
        spare = self.machines.gpu.memory_gib * GIB - self.memory.gpu_with_overhead
        spare_gib = int((spare / FRAGMENTATION - 2 * job.shape.residual_bytes) / GIB)
        if not job.streamed or self.fits_host or spare_gib <= 0:
            return []
        gib = job.device_memory_bytes // GIB + spare_gib
        fits = self.with_job(replace(job, device_memory_bytes=gib * GIB)).fits
        return [f"--ds-sequence-parallel-fpdt-device-memory {gib} keeps chunks on the GPU, and fits"] if fits else []

    def _if_it_fits(self, job: Job, line: str) -> list[str]:
        plan = self.with_job(job)
        if not plan.fits_gpu:
            return []
        return [line if plan.fits_host else f"{line}, with {plan._host_memory_per_machine()}"]

    def _host_memory_per_machine(self) -> str:
        needed = self.memory.host * min(self.machines.gpus_per_node, self.job.num_gpus) / GIB
        return f"{needed:.0f} GiB of host memory per machine"
