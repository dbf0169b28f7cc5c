"""Flags shared by the tools that run a model: the model, its execution, and its tokenizer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

import torch
from argument_types import real, whole

from megatron.arguments import token_count
from megatron.config.tokenizer import TiktokenPattern, TokenizerConfig
from megatron.evaluation.errors import EvaluationError
from megatron.fpdt.host_pool import HostMemoryError
from megatron.generation.cached_model import CachedModel
from megatron.generation.loading import Inference, OpenedModel
from megatron.tokenizer import TOKENIZER_TYPES, Tokenizer, TokenizerError, build_tokenizer
from megatron.weights.opening import newest_checkpoint
from megatron.weights.portable_config import CONFIG_FILE, read_json

GIB = 2**30
FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ChosenModel:
    """The model, the tokenizer and the execution that flags choose; no weight is read yet."""

    inference: Inference
    tokenizer: Tokenizer
    opened: OpenedModel

    @classmethod
    def of(cls, arguments: argparse.Namespace, isolated_chunks: bool = False) -> ChosenModel:
        """Open what the flags name.

        ValueError for an impossible execution, TokenizerError without a tokenizer, WeightsError without a model or with
        a damaged one.
        """
        return cls(
            inference_of(arguments, isolated_chunks),
            tokenizer_of(arguments),
            OpenedModel(arguments.load, with_hashes=not arguments.no_verify_checkpoint),
        )

    @property
    def num_ids(self) -> int:
        """Number of ids that both the model and the tokenizer have."""
        return min(self.opened.num_ids, self.tokenizer.vocab_size)

    def check_length(self, flags: str, longest: int) -> None:
        """Raise EvaluationError, naming the flags, if the model has not learned so many positions."""
        learned = self.opened.max_length
        if learned is not None and longest > learned:
            raise EvaluationError(
                f"{flags} ({longest} tokens) must be at most {learned}, the positions that the model has learned; use "
                "less."
            )

    def build(self, longest: int) -> CachedModel:
        """Read the weights and build the model, for sequences of at most `longest` tokens."""
        return self.opened.build(self.inference, longest, self.num_ids)


def run_on_model(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Return the exit code of `run`; 2, after one line, for an error that the user can fix."""
    try:
        return run(arguments)
    except (ValueError, OSError, HostMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model, its execution and its tokenizer."""
    _add_execution_arguments(parser)
    _add_tokenizer_arguments(parser)


def _add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--load", type=Path, required=True, metavar="MODEL",
        help="a training checkpoint of any layout, portable weights, or a Hugging Face folder",
    )  # fmt: skip
    add_verification_argument(model)
    model.add_argument("--device", help="[cuda where there is a GPU, else cpu]")
    model.add_argument("--dtype", choices=FORMATS, help="number format of weights and cache [bf16; fp32 on the CPU]")
    fpdt = "--ds-sequence-parallel-fpdt"
    model.add_argument(
        f"{fpdt}-chunk-size", type=token_count, default=65536, metavar="TOKENS", help="tokens per chunk [%(default)s]"
    )
    model.add_argument(f"{fpdt}-offloading", action="store_true", help="offload chunks and the KV cache to host memory")
    model.add_argument(
        f"{fpdt}-device-memory", type=real(0, "40"), default=0, metavar="GIB",
        help="with offloading: GPU memory for chunks that stay on the GPU [%(default)g]",
    )  # fmt: skip
    model.add_argument(
        f"{fpdt}-host-memory",
        type=real(0, "64", open_low=True),
        metavar="GIB",
        help="maximum host memory to use [no limit]",
    )


def add_verification_argument(parser: argparse._ActionsContainer) -> None:
    """Add the flag that turns off hashing before reading, under the name that training uses."""
    parser.add_argument(
        "--no-verify-checkpoint", action="store_true",
        help="compare only the sizes of the files with the manifest before reading them, not their hashes",
    )  # fmt: skip


def _add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the tokenizer, under the names that training uses."""
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        help="[HFTokenizer, of the tokenizer.json next to the weights, or what the weights were trained with]",
    )
    tokenizer.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument("--tokenizer-model", help="model file of the other kinds")
    tokenizer.add_argument(
        "--tiktoken-pattern",
        choices=get_args(TiktokenPattern),
        help="model family whose pattern TikTokenizer splits text by [those that published such a file]",
    )
    tokenizer.add_argument("--vocab-size", type=whole(1, "32000"), help="number of ids of NullTokenizer")


def tokenizer_of(arguments: argparse.Namespace) -> Tokenizer:
    """Build the tokenizer that the flags name, else the one next to the weights, else that of the training run.

    TokenizerError if there is none.
    """
    named = TokenizerConfig(**{field.name: getattr(arguments, field.name) for field in fields(TokenizerConfig)})
    if named.tokenizer_type is None:
        named = replace(named, tokenizer_type="HFTokenizer")
        if named.tokenizer_model is None:
            named = _tokenizer_next_to(newest_checkpoint(arguments.load))
    return build_tokenizer(**vars(named))


def _tokenizer_next_to(folder: Path) -> TokenizerConfig:
    """Return the tokenizer settings of a folder of weights: its tokenizer.json, or the flags of the training run."""
    if not folder.is_dir():
        raise TokenizerError(f"--load ({folder}) is no folder; name one with a checkpoint, weights or a model.")
    if (folder / "tokenizer.json").is_file():
        return TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(folder / "tokenizer.json"))
    config = folder / CONFIG_FILE
    trained_with = read_json(config).get("tokenizer") if config.is_file() else None
    if trained_with is None:
        raise TokenizerError(f"{folder} has no tokenizer.json; name the tokenizer by --tokenizer-type.")
    return TokenizerConfig(**trained_with)


def inference_of(arguments: argparse.Namespace, isolated_chunks: bool = False) -> Inference:
    """Return the execution that the flags ask for; ValueError if it is impossible."""
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(arguments.device or ("cuda" if has_gpu else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device ({arguments.device}) is unknown; use cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"--device ({arguments.device}) is not there: this machine has no GPU; use cpu.")
    host_memory = arguments.ds_sequence_parallel_fpdt_host_memory
    return Inference(
        device=device,
        dtype=FORMATS[arguments.dtype or ("fp32" if device.type == "cpu" else "bf16")],
        chunk_size=arguments.ds_sequence_parallel_fpdt_chunk_size,
        offloading=arguments.ds_sequence_parallel_fpdt_offloading,
        device_memory_bytes=int(arguments.ds_sequence_parallel_fpdt_device_memory * GIB),
        host_memory_bytes=None if host_memory is None else int(host_memory * GIB),
        isolated_chunks=isolated_chunks,
    )
