#!/usr/bin/env python3
"""Plan the longest context of some models on some machines: the planned tables of docs/reach.md.

    tools/plan_reach.py                                                the first table, in some minutes
    tools/plan_reach.py --machines "24 GB + 64 GiB" --trained LoRA     some of its rows
    tools/plan_reach.py --published                                    what others publish, and the plan beside it
    tools/plan_reach.py --update                                       both, written into docs/reach.md

Each figure is what tools/plan_context.py finds with the flags of its row and column, with the time of a step.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from plan_context import parse_arguments as parse_plan
from planning.inputs import stated_plan
from planning.output import duration

from megatron.planner.reach import longest
from megatron.ranks.interrupts import run_tool

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reach.md"
SHORTEST = 8192  # tokens that are worth a row
MODELS = ("Llama-3.2-1B", "Llama-3.1-8B", "Qwen3-32B", "Llama-3.1-70B")
MACHINES = {
    "24 GB + 64 GiB": "--gpu RTX-4090 --host-memory 64",
    "24 GB + 64 GiB + 2 TB of disk": "--gpu RTX-4090 --host-memory 64 --disk-memory 2000",
    "80 GB + 128 GiB": "--gpu H100 --host-memory 128",
    "80 GB + 256 GiB": "--gpu H100 --host-memory 256",
    "4 x 80 GB + 512 GiB": "--gpu H100 --gpus 4 --host-memory 512",
    "4 x 141 GB + 503 GiB": "--gpu H200 --gpus 4 --host-memory 503",
    "8 x 80 GB + 2 TB": "--gpu H100 --gpus 8 --host-memory 2048",
}
TRAINED = {"all weights": "", "LoRA": "--lora-rank 16", "QLoRA": "--lora-rank 16 --quantize-base nf4"}


class Published(NamedTuple):
    """What others publish, and the flags of the plan beside it."""

    source: str
    what: str
    longest: str
    model: str
    flags: str


ALST, UPIPE = "[ALST](https://arxiv.org/abs/2506.13996)", "[UPipe](https://arxiv.org/abs/2602.21196)"
UNSLOTH = "[Unsloth](https://github.com/unslothai/unsloth)"
UNSLOTH_500K = "[Unsloth](https://docs.unsloth.ai/new/500k-context-length-fine-tuning)"
FPDT = "[FPDT](https://arxiv.org/abs/2408.16978)"
TRL = "[TRL](https://huggingface.co/docs/trl/en/long_context_training)"
SWIFT = "[ms-swift](https://github.com/modelscope/ms-swift)"
ON_80_GB = "--gpu H100 --host-memory 128"
A100S = "--gpu A100-80GB --gpus"
PUBLISHED = (
    Published(ALST, "8B, all weights, 1 H100", "500K", "Llama-3.1-8B", "--gpu H100 --host-memory 1900"),
    Published(ALST, "8B, all weights, 8 H100", "3.7M", "Llama-3.1-8B", "--gpu H100 --gpus 8 --host-memory 1900"),
    Published(ALST, "8B, all weights, 32 H100", "15M", "Llama-3.1-8B", "--gpu H100 --gpus 32 --host-memory 1900"),
    Published(UPIPE, "8B, all weights, 8 H100", "5M", "Llama-3.1-8B", "--gpu H100 --gpus 8 --host-memory 1900"),
    Published(UPIPE, "8B, all weights, 16 H100", "8M", "Llama-3.1-8B", "--gpu H100 --gpus 16 --host-memory 1900"),
    Published(FPDT, "8B, all weights, 4 A100", "2M", "Llama-3.1-8B", f"{A100S} 4 --host-memory 950"),
    Published(FPDT, "8B, all weights, 8 A100", "4M", "Llama-3.1-8B", f"{A100S} 8 --host-memory 1900"),
    Published(FPDT, "70B, all weights, 32 A100", "4M", "Llama-3.1-70B", f"{A100S} 32 --host-memory 1900"),
    Published(TRL, "8B, all weights, 32 H100", "4M", "Qwen3-8B", "--gpu H100 --gpus 32 --host-memory 1900"),
    Published(SWIFT, "32B, LoRA, 8 A100", "512,000", "Qwen2.5-32B", f"{A100S} 8 --host-memory 1900 {TRAINED['LoRA']}"),
    Published(
        UNSLOTH, "8B, QLoRA, 24 GB", "78,475", "Llama-3.1-8B", f"{MACHINES['24 GB + 64 GiB']} {TRAINED['QLoRA']}"
    ),
    Published(UNSLOTH, "8B, QLoRA, 80 GB", "342,733", "Llama-3.1-8B", f"{ON_80_GB} {TRAINED['QLoRA']}"),
    Published(UNSLOTH, "70B, QLoRA, 80 GB", "89,389", "Llama-3.1-70B", f"{ON_80_GB} {TRAINED['QLoRA']}"),
    Published(
        UNSLOTH_500K, "gpt-oss-20b, QLoRA, 80 GB", "290K, 500K+", "gpt-oss-20b", f"{ON_80_GB} {TRAINED['QLoRA']}"
    ),
)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"[{' '.join(MODELS)}]")
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES), help="[all]")
    parser.add_argument("--trained", nargs="+", choices=TRAINED, default=list(TRAINED), help="[all]")
    parser.add_argument("--update", action="store_true", help="write both tables into docs/reach.md")
    parser.add_argument("--published", action="store_true", help="print the table of what others publish")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    table = lines_of(arguments.models, arguments.machines, arguments.trained)
    if arguments.update:
        text = DOCUMENT.read_text(encoding="utf-8")
        for name, lines in (("planned", table), ("published", published_lines())):
            text = with_table(text, name, lines)
        DOCUMENT.write_text(text, encoding="utf-8")
        return 0
    for line in published_lines() if arguments.published else table:
        print(line, flush=True)
    return 0


def with_table(text: str, name: str, lines: Iterable[str]) -> str:
    """Return the text with the lines between the comments that name a table."""
    start, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return "".join((before, start, "\n".join(lines), end, after))


def published_lines() -> Iterator[str]:
    """Yield a table in Markdown, with a row per published length."""
    yield "| published | model and machine | its longest | flags of the plan | planned |"
    yield "|---|---|---|---|---|"
    for source, what, longest_published, model, flags in PUBLISHED:
        cells = (source, what, longest_published, f"`--model {model} {flags}`", reach(model, flags))
        yield f"| {' | '.join(cells)} |"


def lines_of(models: Sequence[str], machines: Sequence[str], trained: Sequence[str]) -> Iterator[str]:
    """Yield a table in Markdown, with a row per machine and what is trained on it."""
    yield f"| machine | flags | {' | '.join(models)} |"
    yield "|---|---|" + "---|" * len(models)
    for machine in machines:
        for what in trained:
            flags = f"{MACHINES[machine]} {TRAINED[what]}".strip()
            yield f"| {machine}, {what} | `{flags}` | {' | '.join(reach(model, flags) for model in models)} |"


def reach(model: str, flags: str) -> str:
    """Return the longest context of a model, and the time of its step; "none" below SHORTEST."""
    plan, _ = stated_plan(parse_plan(["--model", model, *shlex.split(flags)]))
    found = longest(plan)
    if found is None or found.job.model.seq_length < SHORTEST:
        return "none"
    return f"{found.job.model.seq_length:,}, {duration(found.speed.step)}"


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
