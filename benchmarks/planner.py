#!/usr/bin/env python3
"""Compare the planner's estimates with measurements.

    python benchmarks/planner.py
    python benchmarks/planner.py --cases gqa-64k mha-128k

Runs benchmarks/training_step.py once per case, each in its own process, and compares the planner's estimates with the
measurements: seconds of an optimizer step, peak GPU memory, host memory of the chunks, and host memory of the whole
process. "off" is estimated over measured, minus one. Exit code 1 if one is off by more than 10%, the limit of
docs/planner.md. Each case writes its own OUTPUT-CASE.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Column, Report, Row, build_parser, parse, run_script

NAME = "planner"
LIMITS = {"seconds": 0.1, "peak_gib": 0.1, "host_used_gib": 0.1, "process_gib": 0.1}  # largest relative error of each
COLUMNS = (
    Column("case", "case", width=16),
    *(
        column
        for name, title, form in (
            ("seconds", "step s", ".3f"),
            ("peak_gib", "GPU GiB", ".2f"),
            ("host_used_gib", "chunks GiB", ".2f"),
            ("process_gib", "process GiB", ".2f"),
        )
        for column in (
            Column(name, title, form),
            Column(f"planned_{name}", "estimated", form),
            Column(f"{name}_off", "off", "+.1%"),
        )
    ),
)
WIDE = "--hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32"
CASES = {
    "gqa-64k": "--seq-length 65536 --chunk 16384 --num-layers 8",
    "gqa-128k-zero2": "--seq-length 131072 --zero-stage 2 --recompute none",
    "gqa-256k-cudnn": "--seq-length 262144 --zero-stage 1 --backend cudnn --recompute mlp --num-layers 3 --steps 1",
    "mha-128k": "--seq-length 131072 --chunk 16384 --num-key-value-heads 24 --num-layers 4 --recompute all",
    "8b-128k": f"--seq-length 131072 --chunk 65536 --num-layers 4 {WIDE}",
    "flash2-64k": "--seq-length 65536 --backend torch-flash --zero-stage 0",
    "cpu-adam-128k": "--seq-length 131072 --zero-stage 2 --cpu-optimizer --num-layers 4",
    "plain-32k": "--seq-length 32768 --plain recomputed",
    "plain-64k-host": "--seq-length 65536 --plain on-host --zero-stage 1",
    "gqa-512k": "--seq-length 524288 --num-layers 2 --steps 1",
    "8b-whole-128k": f"--seq-length 131072 --num-layers 32 --steps 1 {WIDE}",
    "8b-one-of-2": f"--as-one-of 2 --seq-length 131072 --chunk 65536 --num-layers 32 --steps 1 {WIDE}",
    "8b-one-of-4": f"--as-one-of 4 --seq-length 131072 --chunk 131072 --num-layers 32 --steps 1 {WIDE}",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
                        help=f"of {', '.join(CASES)} [all]")  # fmt: skip
    return parse(parser, argv, {"cases": ["gqa-64k"]}, {"cases": ["tiny"]})


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report = Report(NAME, arguments, COLUMNS)
    for case in arguments.cases:
        report.add({"case": case} | measure_case(case, arguments))
    report.finish()
    draw(report)
    wrong = [line for row in report.rows for line in beyond_the_limits(row)]
    print("\n".join(wrong) or "everything within its limits")
    return 1 if wrong else 0


def measure_case(case: str, arguments: argparse.Namespace) -> Row:
    """Measure the row of one case in its own process."""
    output = arguments.output.with_name(f"{arguments.output.name}-{case}")
    words = ["--device", arguments.device, "--step-only", "--output", str(output), *CASES.get(case, "").split()]
    words += ["--commit", arguments.commit] if arguments.commit else []
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("training_step.py")), *words], capture_output=True, text=True
    )
    if run.returncode:
        last = (run.stderr or run.stdout).strip().splitlines()[-1:]
        return {"failed": f"exit code {run.returncode}: {' '.join(last)}"}
    return compared(*json.loads(output.with_name(output.name + ".json").read_text())["rows"])


def compared(step: Row, planned: Row) -> Row:
    """Return the measurements, the estimates, and the relative errors."""
    known = [name for name in LIMITS if step[name]]
    return (
        {name: step[name] for name in LIMITS}
        | {f"planned_{name}": planned[name] for name in LIMITS}
        | {f"{name}_off": planned[name] / step[name] - 1 for name in known}
    )


def beyond_the_limits(row: Row) -> list[str]:
    """Return a line for each estimate beyond its limit, and for a case that failed."""
    if "failed" in row:
        return [f"{row['case']}: {row['failed']}"]
    return [
        f"{row['case']}: {name} is off by {row[f'{name}_off']:+.1%}, {limit:.0%} is allowed"
        for name, limit in LIMITS.items()
        if abs(row.get(f"{name}_off", 0.0)) > limit
    ]


def draw(report: Report) -> None:
    """Plot the relative error of each estimate, per case."""
    rows = [row for row in report.rows if "failed" not in row]
    with report.picture(1) as (panel,):
        for position, (name, limit) in enumerate(LIMITS.items()):
            places = [index + 0.2 * (position - 1.5) for index in range(len(rows))]
            panel.bar(places, [100 * row.get(f"{name}_off", 0.0) for row in rows], 0.2, label=f"{name}, {limit:.0%}")
        panel.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=30)
        panel.set(ylabel="estimated over measured, minus 1, in %")
        panel.legend()


if __name__ == "__main__":
    sys.exit(run_script(main))
