"""The plot of memory and time over length."""

from __future__ import annotations

from pathlib import Path

from megatron.planner.hardware import GIB
from planning.output import Answer, headline


def draw(answer: Answer, path: Path) -> None:
    """Plot GPU and host memory, and the time of a step, over the length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    plan = answer.plan
    smallest = 8192 * plan.job.sequence_parallel_size
    reached = answer.longest.job.model.seq_length if answer.longest else 0
    longest = max(reached, plan.job.model.seq_length, smallest)
    lengths = [smallest * 2**n for n in range((longest // smallest).bit_length())]
    plans = [plan.with_job(plan.job.at(length)) for length in lengths]
    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    memory.plot(lengths, [each.memory.gpu_with_overhead / GIB for each in plans], marker="o", label="GPU")
    memory.plot(lengths, [each.memory.host / GIB for each in plans], marker="s", label="host, per GPU")
    memory.axhline(plan.machines.gpu.memory_gib, linestyle="--", color="C0", linewidth=1)
    memory.axhline(plan.machines.host_bytes_per_gpu / GIB, linestyle="--", color="C1", linewidth=1)
    memory.set(ylabel="GiB; dashed: available", yscale="log")
    memory.legend()
    time.plot(lengths, [each.speed.step for each in plans], marker="o")
    time.set(ylabel="seconds per step", yscale="log")
    for panel in (memory, time):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens")
        panel.xaxis.set_major_formatter(lambda tokens, _: f"{int(tokens) // 1024}K")
    figure.suptitle(headline(plan), fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
