#!/usr/bin/env python3
"""Run tasks of lm-eval, EleutherAI's evaluation harness, on a model at any context length.

    tools/eval_harness.py --load MODEL --tasks hellaswag longbench_narrativeqa --output results.json
    tools/eval_harness.py --load MODEL --tasks mine --include-path folder/of/yaml --num-fewshot 5 --limit 100

With --ds-sequence-parallel-fpdt-offloading the KV cache is in host memory, so contexts may be longer than fit on the
GPU. lm-eval itself reads the tasks and their data, which it may download. MODEL is a training checkpoint, portable
weights or a Hugging Face folder.
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
from megatron.ranks.interrupts import run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="names of lm-eval's tasks or groups")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="folder with definitions of more tasks")
    tasks.add_argument("--num-fewshot", type=whole(0, "5"), metavar="N", help="examples in the prompt [the task's]")
    tasks.add_argument("--limit", type=whole(1, "100"), metavar="N", help="first samples of each task [all]")
    tasks.add_argument(
        "--metadata", type=json.loads, metavar="JSON",
        help='settings of the tasks, such as {"max_seq_lengths": [131072], "tokenizer": "FOLDER"} of lm-eval\'s ruler',
    )  # fmt: skip
    tasks.add_argument(
        "--max-length", type=token_count, metavar="TOKENS",
        help="maximum tokens of a request, answer included [the positions of the model]",
    )  # fmt: skip
    tasks.add_argument("--seed", type=whole(0, "1234"), default=1234, help="of sampled answers [%(default)s]")
    tasks.add_argument("--output", type=Path, metavar="FILE", help="JSON to write [none]")
    add_model_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.max_length is not None and arguments.max_length < 2:
        parser.error(f"--max-length ({arguments.max_length}) must be 2 or more.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    return run_on_model(run, parse_arguments(argv))


def run(arguments: argparse.Namespace) -> int:
    """Evaluate the tasks, print their table, and write the results as JSON if asked."""
    require_package("lm_eval", "eval_harness.py")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from megatron.evaluation.harness import HarnessModel

    chosen = ChosenModel.of(arguments)
    manager = TaskManager(
        include_path=None if arguments.include_path is None else str(arguments.include_path),
        metadata=arguments.metadata,
    )
    longest = arguments.max_length or chosen.opened.portable.model.max_position_embeddings
    chosen.check_length("--max-length", longest)
    results = simple_evaluate(
        model=HarnessModel(chosen.build(longest), chosen.tokenizer, longest, arguments.seed),
        tasks=arguments.tasks,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        task_manager=manager,
        metadata=arguments.metadata,
        log_samples=False,
        bootstrap_iters=0,
    )
    print(make_table(results))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"load": str(arguments.load), "results": results["results"]}
        arguments.output.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
