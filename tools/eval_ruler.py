#!/usr/bin/env python3
"""Score a model on RULER's tasks (arXiv 2404.06654), built from local text at any length.

    tools/eval_ruler.py --load MODEL --text book.txt --lengths 4096 32768 131072 --samples 50 --output-dir ruler
    tools/eval_ruler.py --load MODEL --text book.txt --tasks vt qa_1 --squad dev-v2.0.json --output-dir ruler

Writes ruler.json and ruler.png, and the answers in the form that RULER's own scorer reads. Contexts are as long as the
model's own tokenizer counts. Scores compare only between runs with the same wording and text: --templates takes
RULER's own wording. With --ds-sequence-parallel-fpdt-offloading a context may be longer than fits on the GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from argument_types import whole
from model_arguments import ChosenModel, add_model_arguments, run_on_model

from megatron.arguments import token_count
from megatron.config.packages import require_package
from megatron.evaluation.heat_map import draw_scores
from megatron.evaluation.ruler.questions import QuestionSource, read_hotpot, read_squad
from megatron.evaluation.ruler.run import Answer, Plan, TaskResult, averages, run_tasks
from megatron.evaluation.ruler.tasks import chosen_tasks, ruler_tasks
from megatron.evaluation.ruler.templates import own_templates, read_templates
from megatron.evaluation.ruler.text import TextSource
from megatron.ranks.interrupts import run_tool

LENGTHS = (4096, 8192)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="text to build contexts of")
    tasks.add_argument("--squad", type=Path, metavar="FILE", help="SQuAD's JSON, for the task qa_1")
    tasks.add_argument("--hotpot", type=Path, metavar="FILE", help="HotpotQA's JSON, for the task qa_2")
    tasks.add_argument(
        "--templates", type=Path, metavar="FILE", help="JSON of other wording, as RULER's TASKS [our own wording]"
    )
    tasks.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks to run, by their names in RULER [all]")
    tasks.add_argument(
        "--lengths", type=token_count, nargs="+", default=LENGTHS, metavar="TOKENS",
        help=f"tokens of prompt and answer {LENGTHS}",
    )  # fmt: skip
    tasks.add_argument(
        "--samples", type=whole(1, "50"), default=50, metavar="N", help="of each task and length [%(default)s]"
    )
    tasks.add_argument("--seed", type=whole(0, "1234"), default=1234, help="[%(default)s]")
    tasks.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="for ruler.json, ruler.png and predictions/"
    )
    add_model_arguments(parser)
    arguments = parser.parse_args(argv)
    if min(arguments.lengths) < 1:
        parser.error(f"--lengths ({min(arguments.lengths)}) must be 1 or more.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    return run_on_model(run, parse_arguments(argv))


def run(arguments: argparse.Namespace) -> int:
    """Ask every task, write the results, and print the scores."""
    require_package("matplotlib", f"the heat map in --output-dir ({arguments.output_dir})")
    chosen, plan, longest = ChosenModel.of(arguments), plan_of(arguments), max(arguments.lengths)
    chosen.check_length("--lengths", longest)
    plan.check(chosen.tokenizer)
    model = chosen.build(longest)
    results = []
    for result in run_tasks(model, chosen.tokenizer, plan):
        print(f"{result.length:>10,} {result.task:<16} {result.score:>7.2f}", flush=True)
        write_predictions(result, arguments.output_dir)
        results.append(result)
    for length, score in averages(results).items():
        print(f"{length:>10,} {'average':<16} {score:>7.2f}")
    write_results(arguments, plan, results)
    print(arguments.output_dir / "ruler.png")
    return 0


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the tasks that the flags name; EvaluationError for a bad source."""
    text = TextSource.of("\n".join(path.read_text(encoding="utf-8") for path in arguments.text))
    templates = own_templates() if arguments.templates is None else read_templates(arguments.templates)
    questions: dict[str, QuestionSource] = {}
    if arguments.squad is not None:
        questions["qa_1"] = read_squad(arguments.squad)
    if arguments.hotpot is not None:
        questions["qa_2"] = read_hotpot(arguments.hotpot)
    tasks = chosen_tasks(ruler_tasks(text, templates, questions), arguments.tasks)
    return Plan(tasks, sorted(set(arguments.lengths)), arguments.samples, arguments.seed)


def write_predictions(result: TaskResult, folder: Path) -> None:
    """Write the answers as RULER's scorer reads them, one file per length and task."""
    path = folder / "predictions" / str(result.length) / f"{result.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_as_line(number, each), ensure_ascii=False) for number, each in enumerate(result.answers)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_line(number: int, answer: Answer) -> dict[str, object]:
    return {
        "index": number,
        "input": answer.prompt,
        "outputs": answer.references,
        "pred": answer.prediction,
        "length": answer.num_tokens,
        "others": {},
    }


def write_results(arguments: argparse.Namespace, plan: Plan, results: Sequence[TaskResult]) -> None:
    """Write ruler.json and ruler.png."""
    scores = [{"task": each.task, "length": each.length, "score": each.score} for each in results]
    content = {
        "load": str(arguments.load),
        "templates": None if arguments.templates is None else str(arguments.templates),
        "samples": plan.num_samples,
        "seed": plan.seed,
        "scores": scores,
        "averages": averages(results),
    }
    (arguments.output_dir / "ruler.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw_scores(results, arguments.output_dir / "ruler.png", f"RULER, {arguments.load.name}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
