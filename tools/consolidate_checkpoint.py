#!/usr/bin/env python3
"""Consolidate the weights of a checkpoint of any ZeRO stage and number of ranks into one folder of safetensors.

    tools/consolidate_checkpoint.py runs/llama/checkpoints weights                    the newest checkpoint, fp32
    tools/consolidate_checkpoint.py runs/llama/checkpoints/global_step1000 weights --dtype bf16

The tensor names are those of this package, and config.json describes the model. `--load weights` starts a training run
from them. No GPU and no process group is needed, and little more memory than the largest tensor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

import torch
from argument_types import real
from model_arguments import add_verification_argument
from progress_bar import progress_bar

from megatron.ranks.interrupts import run_tool
from megatron.weights.errors import WeightsError
from megatron.weights.opening import newest_checkpoint, open_state
from megatron.weights.portable import write_portable
from megatron.weights.portable_config import CONFIG_FILE
from megatron.weights.published_config import PUBLISHED_FILE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ONE_FILE_BYTES = 2**62
SHARD_GB = real(0, "5", open_low=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of --save, or global_stepN in it")
    parser.add_argument("output", type=Path, help="new folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of floating-point tensors [%(default)s]")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--max-shard-gb", type=SHARD_GB, default=5, help="size of a file, 10^9 bytes [%(default)s]")
    size.add_argument("--one-file", action="store_true", help="write one file, model.safetensors, however large")
    add_verification_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    max_bytes = ONE_FILE_BYTES if arguments.one_file else max(int(arguments.max_shard_gb * 10**9), 1)
    try:
        path = newest_checkpoint(arguments.checkpoint)
        source = open_state(path, with_hashes=not arguments.no_verify_checkpoint)
        with progress_bar("tensor", len(source.names)) as bar:
            write_portable(
                source,
                [path / CONFIG_FILE, path / PUBLISHED_FILE],
                arguments.output,
                DTYPES[arguments.dtype],
                max_bytes,
                report=lambda _: bar.update(),
            )
    except (WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {len(source.names)} tensors of {path} in {arguments.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
