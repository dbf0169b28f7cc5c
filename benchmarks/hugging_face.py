#!/usr/bin/env python3
"""Measure one block and whole optimizer steps of a Hugging Face model's geometry, with random weights.

    python benchmarks/hugging_face.py --config models/Qwen3-30B-A3B --layers 8
    torchrun --nproc-per-node 2 benchmarks/hugging_face.py --config models/Qwen3-30B-A3B --layers 16
    python benchmarks/hugging_face.py --config models/Llama-3-8B --layers 8 --seq-length 131072 --native

CONFIG is a config.json, or its folder; no weights are read. The model is built on the device and runs as --hf-model
does; everything else is as in benchmarks/training_step.py, whose docstring explains the columns. With --native, the
LLaMA of this repository runs in the same way at the same widths, for a model of transformers' LLaMA class.

--lora-rank trains adapters on frozen weights, and --quantize-base stores these in 4 bits, quantized as they are loaded.
With --chunk auto, --device-memory auto and --zero-stage 0 a step is that of pretrain_gpt.py on one GPU; where it takes
minutes, add --steps 1 --no-warm-up.

"one block" is one layer. Where the kinds of layers alternate, such as those with a sliding window and those without,
it is the mean of one period of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args
from zlib import crc32

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.block import SMALL_VOCABULARY, Build
from benchmarks.common import Geometry, build_parser, parse, run_script
from benchmarks.run_flags import add_run_flags, as_flags, check_run_flags, num_gpus_of, run_flags
from benchmarks.training_step import NATIVE, Kind, measure_run, training_flags
from megatron.arguments import parse_args
from megatron.checkpointing.adapters import source_over
from megatron.config import AdaptersConfig, Config, ConfigError, HuggingFaceModelConfig, ModelConfig
from megatron.config.adapters import QuantizedFormat
from megatron.core.parallel_state import ParallelState
from megatron.hf.adapters import add_adapters
from megatron.hf.building import build_hugging_face_model
from megatron.hf.conversions import EmptyTensors, Forms
from megatron.hf.materialization import empty_model, materialize
from megatron.hf.model import UNITS, HuggingFaceModel
from megatron.hf.quantization import quantize_base
from megatron.hf.settings import read_model, transformers_config, with_adapters
from megatron.model.builder import Execution
from megatron.model.initialization import Initialization
from megatron.weights.parameters import owned_tensors
from megatron.weights.source import WEIGHTS

NAME = "hugging_face"
QUICK: dict[str, Any] = {"seq_length": 131072}
TINY: dict[str, Any] = {"seq_length": 128, "chunk": 48}
# Of a block: it is measured without embedding, head and loss.
SMALL: dict[str, Any] = {"vocab_size": SMALL_VOCABULARY, "pad_token_id": None, "output_router_logits": False}
STANDARD_DEVIATION = 0.02  # of random weights
# Settings with one value per layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--config", required=True, help="config.json of the model, or its folder")
    parser.add_argument("--layers", type=int, help="layers of the model [those of CONFIG]")
    parser.add_argument("--lora-rank", type=int, help="train adapters of this rank; with --step-only [all weights]")
    parser.add_argument("--quantize-base", choices=get_args(QuantizedFormat),
                        help="the frozen weights of the blocks in 4 bits; with --lora-rank")  # fmt: skip
    parser.add_argument("--native", action="store_true", help="the LLaMA of this repository instead")
    add_run_flags(parser)
    arguments = parse(parser, argv, QUICK, TINY)
    check_run_flags(parser, arguments)
    if arguments.lora_rank and (arguments.native or not arguments.step_only):
        parser.error("--lora-rank measures steps of the model of transformers; add --step-only, without --native")
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
    flags = ["--hf-model", arguments.config, *run_flags(arguments, num_gpus_of(arguments)), *adapter_flags(arguments)]
    config = parse_args(flags)
    model, block = (
        model_of(part, config.model) for part in (first_layers(content, arguments.num_layers), one_block(content))
    )
    if not config.adapters.is_used:
        return measure_run(arguments, replace(config, model=model), block, Kind(prepare, UNITS), NAME)
    config = replace(config, model=with_adapters(model, config.adapters))
    kind = Kind(partial(prepare, adapters=config.adapters), UNITS, load_adapted)
    return measure_run(arguments, config, block, kind, NAME)


def adapter_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of adapters."""
    values = {name: getattr(arguments, name) for name in ("lora_rank", "quantize_base")}
    return as_flags({name: value for name, value in values.items() if value is not None}, [])


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


def prepare(config: ModelConfig, dtype: torch.dtype, adapters: AdaptersConfig | None = None) -> Build:
    """Build the model without its parameters; see benchmarks.training_step.Kind."""
    empty = empty_model(transformers_config(cast(HuggingFaceModelConfig, config)), dtype)
    if adapters is not None:
        add_adapters(empty, adapters)
        if adapters.quantize_base is not None:
            quantize_base(empty)

    def build(
        config: ModelConfig,
        padded_vocab_size: int,
        parallel_state: ParallelState,
        execution: Execution,
        initialization: Initialization,
    ) -> HuggingFaceModel:
        materialize(empty, initialization, random=adapters is None)
        return build_hugging_face_model(empty, parallel_state, execution, config.attention_backend)

    return build


@dataclass(frozen=True)
class RandomWeights:
    """A StateSource in place of the folder of a model: random matrices, norms of one, biases of zero; on `device`."""

    forms: Forms
    device: torch.device
    step: None = None
    loss_scale: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return self.forms.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.forms.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.forms.dtype(name)

    def get(self, name: str) -> Tensor:
        shape, how = self.shape(name), {"dtype": self.dtype(name), "device": self.device}
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith("weight")), **how)
        generator = torch.Generator(self.device).manual_seed(crc32(name.encode()))
        return torch.empty(shape, **how).normal_(std=STANDARD_DEVIATION, generator=generator)

    def parts(self, name: str) -> Sequence[str]:
        return (WEIGHTS,)

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        return self.get(name).flatten()[start : start + count]


def load_adapted(engine: Any, config: Config) -> None:
    """Load weights as a run does: new adapters, and frozen weights that come one by one and are quantized, if asked."""
    parameter = next(engine.module.parameters())
    model = empty_model(transformers_config(cast(HuggingFaceModelConfig, config.model)), parameter.dtype)
    base = RandomWeights(EmptyTensors(owned_tensors(model)), parameter.device)
    engine.load_state(source_over(base, engine, config, None), with_optimizer=False)


if __name__ == "__main__":
    sys.exit(run_script(main))
