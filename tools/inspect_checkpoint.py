#!/usr/bin/env python3
"""Describe a checkpoint or a folder of weights, or compare it with another one.

    tools/inspect_checkpoint.py runs/llama/checkpoints                 newest checkpoint: run, settings, every tensor
    tools/inspect_checkpoint.py weights --diff runs/llama/checkpoints  names, shapes, dtypes, values, settings

Reads DeepSpeed checkpoints of any ZeRO stage, universal checkpoints, and safetensors, including Hugging Face's. One
tensor at a time is in memory. Exit code of --diff: 0 if nothing differs, 1 if something does, 2 if one cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from model_arguments import add_verification_argument
from torch import Size

from megatron.core.json_text import parse_object
from megatron.ranks.interrupts import run_tool
from megatron.weights.comparison import flattened, form_differences, names_only_in, value_differences
from megatron.weights.deepspeed_checkpoint import DeepSpeedCheckpoint
from megatron.weights.errors import WeightsError
from megatron.weights.opening import kind_of, newest_checkpoint, open_state
from megatron.weights.source import StateSource

MIB = 2**20
RUN_FILES = ("train_state.json", "layout.json")
# Keys that record how a run got its settings, not the settings themselves.
PROVENANCE_KEYS = ("given", "notes")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of --save, global_stepN in it, or safetensors")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with this one")
    add_verification_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        path, with_hashes = newest_checkpoint(arguments.path), not arguments.no_verify_checkpoint
        if arguments.diff is None:
            for line in description(path, with_hashes):
                print(line)
            return 0
        found = 0
        for line in differences(path, newest_checkpoint(arguments.diff), with_hashes):
            print(line)
            found = 1
        return found
    except (WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def description(path: Path, with_hashes: bool) -> Iterator[str]:
    """Yield a line for each part: kind, run, settings, tensors."""
    source = open_state(path, with_hashes)
    yield f"{path}: {kind_of(path)}{_origin(source)}"
    for file in RUN_FILES:
        yield from (f"{name}: {value}" for name, value in _read_json(path / file).items())
    config = _read_json(path / "config.json")
    yield from (f"{name}: {value}" for name, value in flattened(_model_settings(config)).items())
    total = num_bytes = 0
    width = max((len(name) for name in source.names), default=0)
    for name in source.names:
        numel, dtype = Size(source.shape(name)).numel(), source.dtype(name)
        total, num_bytes = total + numel, num_bytes + numel * dtype.itemsize
        form = f"{list(source.shape(name))!s:20} {str(dtype).removeprefix('torch.'):9}"
        yield f"{name:{width}} {form} {numel * dtype.itemsize / MIB:10.3f} MiB{_moments(source, name)}"
    for name, owner in getattr(source, "aliases", {}).items():
        yield f"{name:{width}} is {owner}"
    yield f"{len(source.names)} tensors, {total:,} parameters, {num_bytes / MIB:,.1f} MiB"


def differences(first_path: Path, second_path: Path, with_hashes: bool) -> Iterator[str]:
    """Yield a line for each difference."""
    first, second = (open_state(path, with_hashes) for path in (first_path, second_path))
    yield from (f"only in {first_path}: {name}" for name in names_only_in(first, second))
    yield from (f"only in {second_path}: {name}" for name in names_only_in(second, first))
    yield from form_differences(first, second)
    for each in value_differences(first, second):
        yield f"{each.name}: max difference {each.largest:.3e}, relative {each.relative:.3e}"
    configs = [flattened(_settings(path)) for path in (first_path, second_path)]
    if all(configs):
        for name in sorted({*configs[0], *configs[1]}):
            values = [config.get(name, "absent") for config in configs]
            if values[0] != values[1]:
                yield f"config {name}: {values[0]} and {values[1]}"


def _origin(source: StateSource) -> str:
    layout = ""
    if isinstance(source, DeepSpeedCheckpoint):
        layout = f" of ZeRO stage {source.zero_stage}" + (f", {source.num_ranks} ranks" if source.num_ranks else "")
    return layout + (f", optimizer step {source.step}" if source.step is not None else ", without optimizer states")


def _moments(source: StateSource, name: str) -> str:
    moments = [part for part in source.parts(name) if part != "fp32"]
    return f"  + {', '.join(moments)}" if moments else ""


def _model_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the model section of this package's config.json; all of another program's."""
    return {"model": config["model"]} if "model" in config else config


def _settings(path: Path) -> dict[str, Any]:
    return {name: value for name, value in _read_json(path / "config.json").items() if name not in PROVENANCE_KEYS}


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path} is not a JSON object ({error}); copy it again.") from error


if __name__ == "__main__":
    sys.exit(run_tool(main))
