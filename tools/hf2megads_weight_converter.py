#!/usr/bin/env python3
"""Convert weights between Hugging Face and this program.

    tools/hf2megads_weight_converter.py to-megatron HF_FOLDER OUT
    tools/hf2megads_weight_converter.py to-hf WEIGHTS OUT
    tools/hf2megads_weight_converter.py flags HF_FOLDER
    tools/hf2megads_weight_converter.py --hf-ckpt-dir HF_FOLDER --save OUT ...             as Megatron-DeepSpeed's

to-megatron converts a Hugging Face folder (config.json and safetensors) to portable weights, which --load reads, and
prints the flags of pretrain_gpt.py that describe the model. It also reads checkpoints of upstream's Megatron-DeepSpeed.
to-hf converts portable weights, or a training checkpoint, to a folder that AutoModelForCausalLM.from_pretrained reads.
A checkpoint of --hf-model becomes a folder of that model, with the names and the config.json that it is published with.
One parameter is in memory at a time, and OUT appears only when it is complete. flags only prints the flags that
to-megatron prints, in one line, and writes nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from model_arguments import add_verification_argument
from upstream_converter import Translation, is_upstream_line, translate

from megatron.arguments import token_count
from megatron.config import Config
from megatron.ranks.interrupts import run_tool
from megatron.tokenizer import TokenizerError
from megatron.tokenizer.hugging_face import HFTokenizer
from megatron.weights.errors import WeightsError
from megatron.weights.families import FAMILIES
from megatron.weights.hugging_face import (
    FORMATS,
    TOKEN_IDS,
    Settings,
    from_hugging_face,
    from_our_names,
    num_rows,
    read_hugging_face_config,
    to_hugging_face,
    training_flags,
)
from megatron.weights.megatron_deepspeed import MegatronDeepSpeedCheckpoint, is_megatron_deepspeed
from megatron.weights.opening import newest_checkpoint, open_state
from megatron.weights.portable_config import CONFIG_FILE, PortableConfig, read_json
from megatron.weights.published_config import PUBLISHED_FILE
from megatron.weights.safetensors_folder import DEFAULT_MAX_SHARD_BYTES
from megatron.weights.source import WeightSource


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = parser.add_subparsers(dest="direction", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("source", type=Path, help="folder to read")
    common.add_argument("out", type=Path, help="folder to write, a new one")
    common.add_argument("--max-shard-size", type=float, default=DEFAULT_MAX_SHARD_BYTES, help="bytes [%(default)g]")
    common.add_argument("--dtype", choices=FORMATS, help="number format to write [as it is stored]")
    to_megatron = directions.add_parser("to-megatron", parents=[common], help="Hugging Face to portable weights")
    to_megatron.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=1, metavar="N",
        help="pad the vocabulary to a multiple of this with the mean of its rows [%(default)s: no padding]",
    )  # fmt: skip
    to_hf = directions.add_parser("to-hf", parents=[common], help="our weights to Hugging Face")
    to_hf.add_argument("--model-type", choices=FAMILIES, help="[the one the weights came from, or the first that fits]")
    tokenizer = to_hf.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--like", type=Path, metavar="HF_FOLDER",
        help="the Hugging Face model that training started from: use its tokenizer, token ids and vocabulary",
    )  # fmt: skip
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER",
        help="for a model trained from scratch: use this tokenizer.json, its vocabulary and its end of text",
    )  # fmt: skip
    to_hf.add_argument(
        "--max-position-embeddings", type=token_count, metavar="TOKENS",
        help="of a checkpoint of --hf-model: context length to write into config.json [the model's own]",
    )  # fmt: skip
    to_hf.add_argument("--vocab-size", type=int, help="rows to keep [those before the padding, where it is known]")
    add_verification_argument(to_hf)
    flags = directions.add_parser("flags", help="the flags of pretrain_gpt.py that describe a Hugging Face model")
    flags.add_argument("source", type=Path, help="folder to read")
    argv = sys.argv[1:] if argv is None else argv
    translation = translate(argv) if is_upstream_line(argv) else Translation(argv)
    arguments = parser.parse_args(translation.argv, argparse.Namespace(translation=translation))
    for flag in ("max_shard_size", "make_vocab_size_divisible_by", "vocab_size", "max_position_embeddings"):
        value = getattr(arguments, flag, None)
        if value is not None and not 1 <= value < 2**63:
            shown = f"{value:g}" if isinstance(value, float) else value
            parser.error(f"--{flag.replace('_', '-')} ({shown}) must be 1 or more, and fit into 63 bits.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        for note in arguments.translation.notes:
            print(f"note: {note}")
        arguments.translation.check()
        if arguments.direction == "flags":
            print(" ".join(training_flags(read_hugging_face_config(arguments.source))))
            return 0
        settings = Settings(int(arguments.max_shard_size), FORMATS.get(arguments.dtype), report=print)
        if arguments.direction == "to-megatron":
            to_megatron(arguments, settings)
        else:
            to_hf(arguments, settings)
    except (WeightsError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def to_megatron(arguments: argparse.Namespace, settings: Settings) -> None:
    """Write portable weights and print the flags that describe them."""
    if (newest_checkpoint(arguments.source) / PUBLISHED_FILE).is_file():
        raise WeightsError(
            f"{arguments.source} is a checkpoint of a run of --hf-model, and to-megatron reads a Hugging Face folder; "
            "write one with to-hf."
        )
    if is_megatron_deepspeed(arguments.source):
        checkpoint = MegatronDeepSpeedCheckpoint(arguments.source)
        portable = checkpoint.config()
        divisor = arguments.make_vocab_size_divisible_by
        if portable.padded_vocab_size % divisor:
            raise WeightsError(
                f"--make-vocab-size-divisible-by ({divisor}) must divide the {portable.padded_vocab_size} rows that "
                "the checkpoint has; leave it out."
            )
        from_our_names(checkpoint, portable, arguments.out, settings)
    else:
        portable = from_hugging_face(arguments.source, arguments.out, settings, arguments.make_vocab_size_divisible_by)
    print(f"{arguments.out} is written; flags of pretrain_gpt.py:")
    print(f"--load {shlex.quote(str(arguments.out))} {' '.join(training_flags(portable))}")


def opened(path: Path, with_hashes: bool) -> tuple[PortableConfig, WeightSource]:
    """Open weights under our names: portable ones, a training checkpoint, or one of upstream's."""
    if is_megatron_deepspeed(path) and not (path / CONFIG_FILE).is_file():
        upstream = MegatronDeepSpeedCheckpoint(path)
        return upstream.config(), upstream
    weights = open_state(path, with_hashes=with_hashes)
    return PortableConfig.read(path, num_rows(weights)), weights


def to_hf(arguments: argparse.Namespace, settings: Settings) -> None:
    """Write a Hugging Face folder."""
    path = newest_checkpoint(arguments.source)
    if (path / PUBLISHED_FILE).is_file():
        published_to_hf(path, arguments, settings)
        return
    if arguments.max_position_embeddings is not None:
        raise WeightsError("--max-position-embeddings is for checkpoints of --hf-model; leave it out.")
    portable, weights = opened(path, with_hashes=not arguments.no_verify_checkpoint)
    beside = [arguments.source]
    if arguments.like is not None:
        like = read_hugging_face_config(arguments.like)
        portable = replace(portable, hugging_face=like.hugging_face, vocab_size=like.vocab_size)
        beside.insert(0, arguments.like)
    if arguments.tokenizer is not None:
        tokenizer = HFTokenizer(arguments.tokenizer)
        ids = {**dict.fromkeys(TOKEN_IDS), "eos_token_id": tokenizer.eod}
        portable = replace(portable, hugging_face=ids, vocab_size=tokenizer.vocab_size)
        beside.insert(0, arguments.tokenizer)
    if arguments.vocab_size is not None:
        portable = replace(portable, vocab_size=arguments.vocab_size)
    family = to_hugging_face(weights, portable, arguments.out, settings, beside, arguments.model_type)
    print(f"{arguments.out} is written, a {family.architecture}.")


def published_to_hf(path: Path, arguments: argparse.Namespace, settings: Settings) -> None:
    """Write the folder of the Hugging Face model that the checkpoint at `path` is of."""
    from megatron.hf.export import Target, save_folder  # imports transformers

    for flag in ("model_type", "vocab_size"):
        if getattr(arguments, flag) is not None:
            raise WeightsError(
                f"--{flag.replace('_', '-')} has no effect on a checkpoint of --hf-model, whose model is described in "
                f"{path / PUBLISHED_FILE}; leave it out."
            )
    published, config = read_json(path / PUBLISHED_FILE), Config.from_dict(read_json(path / CONFIG_FILE))
    source = open_state(path, with_hashes=not arguments.no_verify_checkpoint)
    trained_from = config.model.hf_model
    if config.adapters.is_used:
        # These import peft.
        from megatron.hf.adapter_export import write_trained
        from megatron.hf.adapters import is_of_adapter

        alone = replace(config.adapters, merge_adapter=False)
        tensors = {name: source.get(name) for name in source.names if is_of_adapter(name)}
        write_trained(tensors, alone, published, Path(trained_from or ""), arguments.out)
        print(f"{arguments.out} is written, an adapter for {trained_from}.")
        return
    folders = (arguments.like, arguments.tokenizer, path, trained_from)
    target = Target(
        arguments.out,
        settings,
        tuple(Path(folder) for folder in folders if folder is not None),
        arguments.max_position_embeddings,
    )
    architecture = save_folder(source, published, target)
    print(f"{arguments.out} is written, a {architecture}.")


if __name__ == "__main__":
    sys.exit(run_tool(main))
