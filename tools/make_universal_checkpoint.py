#!/usr/bin/env python3
"""Convert a checkpoint to a form that any number of ranks, ZeRO stage and number format can resume from.

    tools/make_universal_checkpoint.py runs/llama/checkpoints runs/llama/universal
    pretrain_gpt.py ... --load runs/llama/universal --universal-checkpoint

The output is DeepSpeed's universal form: weights, Adam's moments and counters, with each parameter in one piece.
--universal-checkpoint also loads the checkpoint itself, where every machine can read it; the universal form is for a
checkpoint that moves elsewhere. No GPU and no process group is needed, and little more memory than the largest tensor.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from model_arguments import add_verification_argument
from progress_bar import progress_bar

from megatron.config.settings_file import SETTINGS_FILE
from megatron.core.atomic_file import atomic_path
from megatron.ranks.interrupts import run_tool
from megatron.weights.errors import WeightsError
from megatron.weights.opening import newest_checkpoint, open_state
from megatron.weights.published_config import BASE_FILE, PUBLISHED_FILE
from megatron.weights.universal_checkpoint import write_universal_checkpoint

COMPANIONS = (
    *("config.json", "layout.json", "train_state.json", "random_*.pt"),
    *(SETTINGS_FILE, PUBLISHED_FILE, BASE_FILE),
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of --save, or global_stepN in it")
    parser.add_argument("output", type=Path, help="folder to write to; the checkpoint keeps its name in it")
    add_verification_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        path = newest_checkpoint(arguments.checkpoint)
        source = open_state(path, with_hashes=not arguments.no_verify_checkpoint)
        companions = [file for pattern in COMPANIONS for file in sorted(path.glob(pattern))]
        target = arguments.output / path.name
        with progress_bar("tensor", len(source.names)) as bar:
            write_universal_checkpoint(source, target, companions, report=lambda _: bar.update())
        name_newest(target)
    except (WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {len(source.names)} tensors with their moments at step {source.step}; resume with")
    print(f"  --load {arguments.output} --universal-checkpoint")
    return 0


def name_newest(target: Path) -> None:
    """Point `latest` to the new checkpoint; remove the checkpoint if that fails."""
    try:
        with atomic_path(target.parent / "latest") as latest:
            latest.write_text(target.name)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise


if __name__ == "__main__":
    sys.exit(run_tool(main))
