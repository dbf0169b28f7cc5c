"""Published long-context results, next to the planner's estimates for this system on the same hardware."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config import Recompute
from megatron.planner.hardware import GIB, GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.models import named_model
from megatron.planner.plan import Plan
from megatron.planner.solver import Open, fastest

UNBOUNDED_HOST = 1e6  # GiB: papers do not always report host memory


@dataclass(frozen=True)
class Published:
    """One published result."""

    source: str
    model: str
    gpu: str
    num_gpus: int
    length: int
    figure: str
    sequence_parallel: int | None = None  # all GPUs where None
    cpu_optimizer: bool = False


M = 2**20
FPDT, ALST, UPIPE = "FPDT (2408.16978)", "ALST (2506.13996)", "UPipe (2602.21196)"
PUBLISHED = (
    Published(FPDT, "gpt-2.7b", "A100-80GB", 2, 2 * M, "trained on 2 GPUs; length not given here"),
    Published(FPDT, "gpt-6.7b", "A100-80GB", 4, 2 * M, "2M"),
    Published(FPDT, "llama-8b", "A100-80GB", 4, 2 * M, "2M, MFU 58.2% as the paper counts"),
    Published(FPDT, "llama-8b", "A100-80GB", 8, 4 * M, "4M"),
    Published(FPDT, "gpt-13b", "A100-80GB", 8, 3 * M, "3M"),
    Published(FPDT, "gpt-30b", "A100-80GB", 16, 3 * M, "3M", sequence_parallel=8),
    Published(FPDT, "llama-70b", "A100-80GB", 32, 4 * M, "4M"),
    Published(ALST, "llama-8b", "H100", 1, 500_000 // 1024 * 1024, "500K, 21-22% cMFU", cpu_optimizer=True),
    Published(ALST, "llama-8b", "H100", 8, 3_700_000 // 8192 * 8192, "3.7M, 21-22% cMFU"),
    Published(ALST, "llama-8b", "H100", 32, 15_000_000 // 32768 * 32768, "15M, 21-22% cMFU"),
    Published(UPIPE, "llama-8b", "H100", 8, M, "475 tokens/s/GPU"),
    Published(UPIPE, "llama-8b", "H100", 8, 2 * M, "246 tokens/s/GPU"),
    Published(UPIPE, "llama-8b", "H100", 8, 3 * M, "166 tokens/s/GPU"),
    Published(UPIPE, "llama-8b", "H100", 8, 4 * M, "125.6 tokens/s/GPU"),
    Published(UPIPE, "llama-8b", "H100", 8, 5 * M, "5M is its longest"),
)


def plan_published(row: Published) -> Plan:
    """Plan a published configuration at its own length, with as much host memory as it needs."""
    model, vocabulary = named_model(row.model, row.length)
    shared = row.sequence_parallel or row.num_gpus
    job = Job(
        model, vocabulary, row.num_gpus, 32768 * shared, shared, cpu_optimizer=row.cpu_optimizer,
        recompute=Recompute.ALL, checkpoint_interval=1,
    )  # fmt: skip
    gpu = GPUS[row.gpu]
    plan = Plan(job, Machines(gpu, row.num_gpus, 8, UNBOUNDED_HOST), next(iter(gpu.attention)))
    return fastest(plan, Open(chunk=True)) or plan


def published_table() -> Iterator[str]:
    """Yield a table in Markdown, with a row per published result.

    Host memory is given as the least with which it runs, to that with which no block input has to be recomputed.
    """
    columns = ("published", "model", "GPUs", "tokens", "its result", "GPU GiB", "host GiB per GPU", "s per step")
    yield f"| {' | '.join(columns)} | tokens/s/GPU | MFU |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in PUBLISHED:
        plan = plan_published(row)
        gpu = f"{plan.memory.gpu_with_overhead / GIB:.0f}" + ("" if plan.fits_gpu else " (does not fit)")
        yield (
            f"| {row.source} | {row.model} | {row.num_gpus} {row.gpu} | {row.length:,} | {row.figure} | {gpu} | "
            f"{plan.lowest_memory().memory.host / GIB:.0f} to {plan.memory.host / GIB:.0f} | {plan.speed.step:.0f} | "
            f"{plan.tokens_per_second_per_gpu:.1f} | {plan.mfu:.1%} |"
        )
