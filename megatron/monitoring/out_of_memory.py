"""Out-of-memory report: what uses the memory, the planner's estimates, and settings that would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch

from megatron.core.host_memory import available_host_bytes
from megatron.engine.engine import Engine
from megatron.fpdt.stream import Stream
from megatron.initialize import GIB, Context
from megatron.logging.run_history import MEMORY, PLANNED
from megatron.planner.plan import Plan
from megatron.planner.reach import advice

CHUNK_SIZE = "--ds-sequence-parallel-fpdt-chunk-size"
WITHOUT_A_PLAN = (
    f"a smaller {CHUNK_SIZE} or --micro-batch-size, a higher --ds-sequence-parallel-size or --zero-stage, or "
    "--cpu-optimizer takes less GPU memory",
    "a shorter --seq-length, a higher --ds-sequence-parallel-size, or more GPUs takes less of both",
    "tools/plan_context.py says what fits a GPU",
)

Row = tuple[str, str]


class OutOfMemory(Exception):
    """GPU or host memory has run out; the message is the whole report, in lines."""


class Ledger:
    """The memory use of a run; `engine` and `stream` are set once they exist."""

    def __init__(self, context: Context, make_plan: Callable[[], Plan | None]) -> None:
        """Take `make_plan`, which plans the run; its result is None where the planner does not cover such a run."""
        self._context, self._make_plan = context, make_plan
        self.engine: Engine | None = None
        self.stream: Stream | None = None

    @contextmanager
    def reporting_out_of_memory(self) -> Iterator[None]:
        """Raise OutOfMemory in place of what torch, the host pool or Python raises within."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            memory = memory_that_ran_out(error)
            if memory is None:
                raise
            raise OutOfMemory("\n".join(self.lines(memory, error))) from error

    def lines(self, memory: str, error: BaseException) -> list[str]:
        """Format the report; its first line is the error itself."""
        plan = self._plan()
        rank = self._context.parallel_state.rank
        lines = [f"out of {memory} memory on rank {rank}: {str(error).splitlines()[0] if str(error) else 'no more'}"]
        lines += _table("GPU memory", self._on_gpu()) if self._context.device.type == "cuda" else []
        lines += _table("host memory", self._on_host())
        if plan is not None:
            lines += _table("the planner estimates, per rank", _estimated(plan))
        return [*lines, "  what to change:", *(f"    - {line}" for line in suggestions(plan, memory))]

    def scalars(self) -> dict[str, float]:
        """Return GiB by owner at the peak so far, and the planner's estimates, by their names in a `RunHistory`."""
        owners = {f"host/{what}": num_bytes for what, num_bytes in self._states("cpu")}
        pool = self.stream.store.pool.allocated_bytes if self.stream is not None else 0
        rest = psutil.Process().memory_info().rss - pool - sum(owners.values())
        owners |= {"host/host pool": pool, "host/process, rest": max(rest, 0)}
        if self._context.device.type == "cuda":
            held = dict(self._states("cuda"))
            if self.stream is not None:
                held["chunks"] = self.stream.store.device_tier.used_bytes
            rest = torch.cuda.max_memory_allocated(self._context.device) - sum(held.values())
            owners |= {f"gpu/{what}": num_bytes for what, num_bytes in held.items()}
            owners["gpu/activations, rest"] = max(rest, 0)
        scalars = {f"{MEMORY}{owner.replace(' ', '_')}": num_bytes / GIB for owner, num_bytes in owners.items()}
        plan = self._plan()
        if plan is not None:
            estimates = {
                "milliseconds": plan.speed.step * 1e3,
                "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
                "mfu": plan.mfu,
                "peak_gpu_gib": plan.memory.gpu / GIB,
                "host_gib": plan.memory.host / GIB,
            }
            scalars |= {f"{PLANNED}{name}": estimate for name, estimate in estimates.items()}
        return scalars

    def _on_gpu(self) -> list[Row]:
        device = self._context.device
        free, total = torch.cuda.mem_get_info(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        held = self._states("cuda")
        if self.stream is not None:
            held.append(("chunks", self.stream.store.device_tier.used_bytes))
        return [
            ("of the GPU", f"{_gib(total)}, {_gib(free)} of it free"),
            ("not torch's", f"{_gib(total - free - reserved)}: other processes, and a little for CUDA itself"),
            ("reserved by torch", _gib(reserved)),
            ("in tensors", f"{_gib(allocated)}, at most {_gib(torch.cuda.max_memory_allocated(device))} so far"),
            *((f"  {what}", _gib(num_bytes)) for what, num_bytes in held),
            ("  activations, rest", _gib(max(allocated - sum(num_bytes for _, num_bytes in held), 0))),
        ]

    def _on_host(self) -> list[Row]:
        rows = [("this process", _gib(psutil.Process().memory_info().rss)), ("free", _gib(available_host_bytes()))]
        rows += [(what, _gib(num_bytes)) for what, num_bytes in self._states("cpu")]
        if self.stream is not None:
            pool = self.stream.store.pool
            limit = f", of {_gib(pool.budget_bytes)} that it may take" if pool.budget_bytes is not None else ""
            rows.append(("host pool", f"{_gib(pool.used_bytes)} used, {_gib(pool.allocated_bytes)} allocated{limit}"))
            disk = self.stream.store.disk_tier
            if disk is not None:
                rows.append(("staging for the disk", _gib(disk.staging.num_bytes)))
                rows.append(("chunks on disk", f"{_gib(disk.used_bytes)} used, {_gib(disk.num_bytes)} reserved"))
        return rows

    def _states(self, device_type: str) -> list[tuple[str, int]]:
        held = self.engine.held_bytes() if self.engine is not None else {}
        return [(what, num_bytes) for (what, device), num_bytes in held.items() if device == device_type]

    def _plan(self) -> Plan | None:
        """Plan the run as it is executed."""
        plan = self._make_plan()
        if plan is None or self.stream is None or not plan.job.streamed:
            return plan
        stream, store = self.stream, self.stream.store
        budget, saving = store.device_tier.budget, stream.saving_at(store.pool.length)
        executed = replace(
            plan.job,
            streamed=budget is not None,  # without a budget nothing is offloaded: the run executes without FPDT
            chunk_length=stream.chunk_length,
            device_memory_bytes=0 if budget is None else budget.total_bytes,
            recompute=saving.recompute,
            checkpoint_interval=saving.checkpoint_interval,
        )
        return plan.with_job(executed)


def memory_that_ran_out(error: BaseException) -> str | None:
    """Return "GPU" or "host"; None for an error of another kind."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's words for host memory
        return "host"
    return "GPU" if "CUDA out of memory" in str(error) or "CUDA error: out of memory" in str(error) else None


def suggestions(plan: Plan | None, memory: str) -> list[str]:
    """Return settings that would fit: the planner's, or those that save most where it estimates that the run fits."""
    if plan is None:
        return list(WITHOUT_A_PLAN)
    if not plan.fits:
        return advice(plan)
    lines = ["the planner estimates that this run fits: look for other processes that use the memory"]
    job, ranks = plan.job, plan.job.sequence_parallel_size
    smaller = plan.with_job(replace(job, chunk_length=max(job.chunk_length // 2 // ranks, 1) * ranks))
    if memory == "GPU" and job.streamed and smaller.memory.gpu < plan.memory.gpu:
        needs, instead = _gib(smaller.memory.gpu_with_overhead), _gib(plan.memory.gpu_with_overhead)
        lines.append(f"{CHUNK_SIZE} {smaller.job.chunk_length} needs {needs} of GPU memory instead of {instead}")
    lower = plan.lowest_memory()
    if memory == "host" and job.streamed and lower.memory.host < plan.memory.host:
        needs, instead = _gib(lower.memory.host), _gib(plan.memory.host)
        saved = lower.job
        flags = (
            f"--ds-sequence-parallel-fpdt-recompute {saved.recompute} --ds-sequence-parallel-fpdt-checkpoint-interval"
        )
        lines.append(f"{flags} {saved.checkpoint_interval} needs {needs} of host memory instead of {instead}")
    return [*lines, f"--seq-length {job.model.seq_length // 2} needs about half of what grows with the sequence"]


def _estimated(plan: Plan) -> list[Row]:
    memory = plan.memory
    gpu, host = plan.machines.gpu.memory_gib, plan.machines.host_bytes_per_gpu
    return [
        ("GPU", f"{_gib(memory.gpu_with_overhead)} of {gpu:.1f} GiB, {_gib(memory.states)} of it for the model"),
        ("host", f"{_gib(memory.host)} of {_gib(host)}, {_gib(memory.host_chunks)} of it for chunks"),
    ]


def _table(title: str, rows: list[Row]) -> list[str]:
    return [f"  {title}", *(f"    {name:<20s} {value}" for name, value in rows)]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
