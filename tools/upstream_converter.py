"""Translation of the command line of Megatron-DeepSpeed's converter to that of this converter.

    --hf-ckpt-dir HF --save OUT                                   to-megatron HF OUT
    --hf-ckpt-dir HF --load CHECKPOINT --save OUT --to-hf-ckpt    to-hf CHECKPOINT OUT --like HF

Megatron-DeepSpeed builds the model from training flags, so all of them must be given. Here config.json describes the
model, and flags that also describe it must agree. The sizes of tensor and pipeline parallelism have no effect: the
weights written do not depend on a layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argument_types import real, whole

from megatron.config import ModelConfig
from megatron.weights.errors import WeightsError
from megatron.weights.hugging_face import read_hugging_face_config

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "kv_channels")
_NUMBERS = ("layernorm_epsilon", "rotary_percent", "rotary_position_embeddings_theta")
_SWITCHES = ("use_rotary_position_embeddings", "swiglu", "disable_bias_linear", "untie_embeddings_and_output_weights")
_DESCRIBED = (*_SIZES, *_NUMBERS, *_SWITCHES, "normalization")
_OWN_FLAGS = ("--hf-", "--to-", "--load")
_USAGE = "%(prog)s --hf-ckpt-dir HF_FOLDER --save OUT [--to-hf-ckpt --load CHECKPOINT] [flags of a training]"


def is_upstream_line(argv: Sequence[str]) -> bool:
    """Return whether a command line is for upstream's converter."""
    return (
        bool(argv)
        and argv[0].startswith("--")
        and any(_dashed(word).startswith(("--hf-ckpt-", "--to-hf-ckpt")) for word in argv)
    )


@dataclass(frozen=True)
class Translation:
    """The same conversion as a command line of this converter."""

    argv: Sequence[str]
    notes: Sequence[str] = ()
    """Flags that were ignored, one line each."""

    described: Mapping[str, Any] = field(default_factory=dict)
    """Model settings that flags give, by our names."""

    hugging_face: str = ""
    """The folder whose config.json must agree with that."""

    def check(self) -> None:
        """Raise WeightsError if a flag contradicts config.json."""
        if not self.described:
            return
        model = read_hugging_face_config(Path(self.hugging_face)).model
        for name, given in self.described.items():
            own = getattr(model, name)
            if given != own:
                raise WeightsError(
                    f"{_flag(name)} ({given}) differs from {own}, which {self.hugging_face} has; use {own}, or leave "
                    "the flag out."
                )


def translate(argv: Sequence[str]) -> Translation:
    """Translate an upstream command line; exits where a flag is missing or cannot be honored."""
    parser = _parser()
    arguments, others = parser.parse_known_args([_dashed(word) for word in argv])
    passed_over = [word.split("=")[0] for word in others if word.startswith("--")]
    for flag in passed_over:
        if flag.startswith(_OWN_FLAGS):
            parser.error(f"{flag} is unknown; the converter's flags are --hf-ckpt-dir, --load-mode, --to-hf-ckpt, ...")
    if arguments.load_mode == "torchbin":
        parser.error(
            "--load-mode (torchbin) reads pytorch_model*.bin, and safetensors are read here; write the model with "
            "save_pretrained of transformers, and use --load-mode auto"
        )
    if arguments.to_hf_ckpt and arguments.load is None:
        parser.error("--to-hf-ckpt needs --load, the checkpoint to convert; add it")
    described = {name: getattr(arguments, name) for name in _DESCRIBED if getattr(arguments, name) is not None}
    folder = arguments.hf_ckpt_dir
    words = ["to-hf", arguments.load, arguments.save, "--like", folder]
    if not arguments.to_hf_ckpt:
        divisor = str(arguments.make_vocab_size_divisible_by)
        words = ["to-megatron", folder, arguments.save, "--make-vocab-size-divisible-by", divisor]
    return Translation(words, _notes(arguments, passed_over), described, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, usage=_USAGE)
    parser.add_argument("--hf-ckpt-dir", required=True)
    parser.add_argument("--hf-ckpt-num-shards", type=int)
    parser.add_argument("--load-mode", choices=("torchbin", "safetensor", "auto"))
    parser.add_argument("--to-hf-ckpt", action="store_true")
    parser.add_argument("--load")
    parser.add_argument("--save", required=True)
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=whole(1, "128"), default=ModelConfig.make_vocab_size_divisible_by
    )
    for side in ("tensor", "pipeline"):
        parser.add_argument(f"--{side}-model-parallel-size", type=whole(1, "1"), default=1)
    for name in _SIZES:
        parser.add_argument(_flag(name), type=whole(1, "the model's own"))
    for name in _NUMBERS:
        others = ("--rope-theta",) if name == "rotary_position_embeddings_theta" else ()
        parser.add_argument(_flag(name), *others, type=real(0, "the model's own"))
    for name in _SWITCHES:
        parser.add_argument(_flag(name), action="store_true", default=None)
    parser.add_argument("--normalization", choices=("layernorm", "rmsnorm"))
    return parser


def _notes(arguments: argparse.Namespace, passed_over: Sequence[str]) -> list[str]:
    notes = []
    sizes = (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size)
    if max(sizes) > 1:
        notes.append(
            f"tensor- and pipeline-parallel sizes ({sizes[0]} and {sizes[1]}) have no effect on what is written; train "
            "at 1 and 1, with --zero-stage 3 or --ds-sequence-parallel-size to spread the model"
        )
    if passed_over:
        notes.append(f"not needed for a conversion, passed over: {' '.join(passed_over)}")
    return notes


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _dashed(word: str) -> str:
    """Replace underscores in a flag's name with dashes; leave other words unchanged."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
