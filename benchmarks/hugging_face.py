#!/usr/bin/env python3
"""Measure one block and whole optimizer steps of a Hugging Face model's geometry, with random weights.

    python benchmarks/hugging_face.py --config models/Qwen3-30B-A3B --layers 8
    torchrun --nproc-per-node 2 benchmarks/hugging_face.py --config models/Qwen3-30B-A3B --layers 16
    python benchmarks/hugging_face.py --config models/Llama-3-8B --layers 8 --seq-length 131072 --native

CONFIG is a config.json, or its folder; no weights are read. The model is built on the device and runs as --hf-model
does; everything else is as in benchmarks/training_step.py, whose docstring explains the columns. With --native, the
LLaMA of this repository runs in the same way at the same widths, for a model of transformers' LLaMA class.

"one block" is one layer. Where the kinds of layers alternate, such as those with a sliding window and those without,
it is the mean of one period of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.block import SMALL_VOCABULARY, Build
from benchmarks.common import Geometry, build_parser, parse, run_script
from benchmarks.run_flags import add_run_flags, check_run_flags, num_gpus_of, run_flags
from benchmarks.training_step import NATIVE, Kind, measure_run, training_flags
from megatron.arguments import parse_args
from megatron.config import ConfigError, HuggingFaceModelConfig, ModelConfig
from megatron.core.parallel_state import ParallelState
from megatron.hf.building import build_hugging_face_model
from megatron.hf.materialization import empty_model, materialize
from megatron.hf.model import UNITS, HuggingFaceModel
from megatron.hf.settings import read_model, transformers_config
from megatron.model.builder import Execution
from megatron.model.initialization import Initialization

NAME = "hugging_face"
QUICK: dict[str, Any] = {"seq_length": 131072}
TINY: dict[str, Any] = {"seq_length": 128, "chunk": 48}
# Of a block: it is measured without embedding, head and loss.
SMALL: dict[str, Any] = {"vocab_size": SMALL_VOCABULARY, "pad_token_id": None, "output_router_logits": False}
# Settings with one value per layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--config", required=True, help="config.json of the model, or its folder")
    parser.add_argument("--layers", type=int, help="layers of the model [those of CONFIG]")
    parser.add_argument("--native", action="store_true", help="the LLaMA of this repository instead")
    add_run_flags(parser)
    arguments = parse(parser, argv, QUICK, TINY)
    check_run_flags(parser, arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    whole = read_model(Path(arguments.config), model_flags(arguments))
    content = dict(whole.hf_config)
    arguments.num_layers, arguments.vocab_size = arguments.layers or whole.num_layers, whole.embedding_rows
    if arguments.native:
        geometry = geometry_of_llama(whole)
        vars(arguments).update(vars(geometry))
        config = parse_args(training_flags(arguments, num_gpus_of(arguments)))
        block = geometry.model_config(arguments.seq_length, arguments.backend)
        return measure_run(arguments, config, block, NATIVE, NAME)
    config = parse_args(["--hf-model", arguments.config, *run_flags(arguments, num_gpus_of(arguments))])
    config = replace(config, model=model_of(first_layers(content, arguments.num_layers), config.model))
    return measure_run(arguments, config, model_of(one_block(content), config.model), HUGGING_FACE, NAME)


def model_flags(arguments: argparse.Namespace) -> ModelConfig:
    """Return the settings of a model that are not of its architecture."""
    return Geometry().model_config(arguments.seq_length, arguments.backend)


def model_of(content: Mapping[str, Any], flags: ModelConfig) -> HuggingFaceModelConfig:
    """Return the settings of the model that a config.json with this content describes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(content))
        return read_model(path, flags)


def first_layers(content: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return the content of a config.json for the first layers of a model."""
    lists = {name: content[name][:num_layers] for name in PER_LAYER if content.get(name)}
    return {**content, **lists, "num_hidden_layers": num_layers}


def one_block(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content for the last layers, as many as there are kinds; no dense layer of a mixture of experts."""
    types, length = content.get("layer_types") or [], content["num_hidden_layers"]
    num_layers = next(n for n in range(1, length + 1) if types[n:] == types[: max(len(types) - n, 0)])
    lists = {name: content[name][-num_layers:] for name in PER_LAYER if content.get(name)}
    dense = {name: value for name, value in (("first_k_dense_replace", 0), ("mlp_only_layers", [])) if name in content}
    return {**content, **lists, **dense, "num_hidden_layers": num_layers, **SMALL}


def geometry_of_llama(model: HuggingFaceModelConfig) -> Geometry:
    """Return the widths of a LLaMA; ConfigError for another model."""
    if model.model_type != "llama":
        raise ConfigError(f"--native runs a LLaMA, and --config describes a {model.model_type}; remove --native")
    return Geometry(**{name: getattr(model, name) for name in vars(Geometry())})


def prepare(config: ModelConfig, dtype: torch.dtype) -> Build:
    """Build the model without its parameters; see benchmarks.training_step.Kind."""
    empty = empty_model(transformers_config(cast(HuggingFaceModelConfig, config)), dtype)

    def build(
        config: ModelConfig,
        padded_vocab_size: int,
        parallel_state: ParallelState,
        execution: Execution,
        initialization: Initialization,
    ) -> HuggingFaceModel:
        materialize(empty, initialization, random=True)
        return build_hugging_face_model(empty, parallel_state, execution, config.attention_backend)

    return build


HUGGING_FACE = Kind(prepare, UNITS)


if __name__ == "__main__":
    sys.exit(run_script(main))
