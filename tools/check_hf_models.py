#!/usr/bin/env python3
"""Check which Hugging Face models train here as they do in transformers, without their weights.

    tools/check_hf_models.py models/Qwen3-30B-A3B     a folder, or its config.json
    tools/check_hf_models.py qwen3_moe gpt_oss        model types of transformers, with their default settings
    tools/check_hf_models.py                          every causal language model that transformers has

A small copy of each model runs whole in transformers and streamed here, in double precision on the CPU; every training
run does the same before it starts. Exit code 1 if a model is refused or wrong.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from megatron.config import ConfigError
from megatron.config.packages import require_package
from megatron.ranks.interrupts import run_tool

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder, config.json or model type; default: all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        require_package("transformers", "check_hf_models.py")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    names = arguments.models or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    width = max(map(len, names))
    outcomes = []
    for name in names:
        outcome, detail = check(name)
        print(f"{name:{width}}  {outcome:7}  {detail}", flush=True)
        outcomes.append(outcome)
    if len(names) > 1:
        print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes))))
    return int(set(outcomes) != {"passes"})


def check(name: str) -> tuple[str, str]:
    """Return whether a model passes, is refused, is wrong or has no configuration, and a sentence on it."""
    from megatron.hf.proof import WrongGradientError, prove

    try:
        config = configuration(name)
    except Exception as error:  # transformers' own checks raise errors of many types
        return "invalid", f"transformers has no such configuration: {_first_line(error)}"
    try:
        return "passes", f"checked {prove(config).line}"
    except WrongGradientError as error:
        return "wrong", str(error)
    except ConfigError as error:
        return "refused", str(error)


def configuration(name: str) -> PretrainedConfig:
    """Return transformers' configuration of a folder, a config.json or a model type."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if Path(name).exists() or name not in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    return CONFIG_MAPPING[name]()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


if __name__ == "__main__":
    sys.exit(run_tool(main))
