"""Checkpoints of upstream's Megatron-DeepSpeed, as a source of weights in our names.

    mp_rank_00_model_states.pt              "args", "checkpoint_version", and without pipeline parallelism the weights
    layer_NN-model_00-model_states.pt       with pipeline parallelism: embedding, blocks, norm and head by their number

Queries, keys and values lie as ours do (since checkpoint_version 2.0), and so do gate and up. Files are mapped one at a
time and read without running what a pickle may hold: a class that it names becomes an inert one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.weights.errors import WeightsError
from megatron.weights.opening import newest_checkpoint
from megatron.weights.portable_config import PortableConfig, model_of

_MODEL_FILE = "mp_rank_00_model_states.pt"
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt$")
_EMBEDDING = "embedding.word_embeddings.weight"
_SUPPORTED = {
    "tensor_model_parallel_size": (1,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "squared_relu": (False,),
    "geglu": (False,),
    "num_experts": (None, 1, [1]),
    "mlp_type": ("standard",),
}
# Same meaning and same name as in ModelConfig.
_SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings",
    "layernorm_epsilon",
)  # fmt: skip
_SWITCHES = ("use_rotary_position_embeddings", "swiglu", "untie_embeddings_and_output_weights")
# (upstream's names, ours), tried in order
_RENAMES = (
    (re.compile(r"^(module\.)?language_model\."), ""),
    (re.compile(r"^(encoder|transformer)\."), ""),
    (re.compile(r"^final_layernorm\."), "head.final_layernorm."),
    (re.compile(r"^output_layer\."), "head.output_layer."),
    (re.compile(r"(^layers\.\d+)\.attention\."), r"\1.self_attention."),
)
_COPIES = ("word_embeddings_for_head.", "inv_freq")  # the embedding once more; what is computed


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: in a file, under a dotted name."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class MegatronDeepSpeedCheckpoint:
    """The weights of a folder global_stepN, or of the folder whose `latest` names one. Tensor-parallel size 1."""

    def __init__(self, path: Path) -> None:
        """WeightsError if there is no such checkpoint, or its model is not supported."""
        self.path = newest_checkpoint(path)
        files = _layer_files(self.path)
        if not (self.path / _MODEL_FILE).is_file():
            raise WeightsError(f"{self.path} has no {_MODEL_FILE}, which holds the architecture; copy it there.")
        content = _load(self.path / _MODEL_FILE)
        self._arguments = _arguments(self.path, content)
        version = content.get("checkpoint_version", 3.0)
        if float(version) < 2.0:
            raise WeightsError(f"{self.path} has checkpoint_version {version}, and 2.0 and later are supported.")
        self._places = _of_layers(files) if files else _of_model(self.path / _MODEL_FILE, content.get("module") or {})
        if _EMBEDDING not in self._places:
            raise WeightsError(f"{self.path} holds no weights of a GPT; name a checkpoint global_stepN.")

    @property
    def names(self) -> Sequence[str]:
        """Names of all parameters, sorted."""
        return tuple(sorted(self._places))

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a parameter, without reading it."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter, without reading it."""
        return self._places[name].dtype

    def get(self, name: str) -> Tensor:
        """One parameter, in CPU memory of its own; its file is let go again."""
        place = self._places[name]
        return dict(_tensors(_load(place.file)))[place.key].clone()

    def config(self) -> PortableConfig:
        """The architecture that upstream's arguments describe; WeightsError for what is not supported."""
        values = self._arguments
        for name, allowed in _SUPPORTED.items():
            value = values.get(name, allowed[0])
            if value not in allowed:
                raise WeightsError(f"{self.path} has {name} {value!r}, and {allowed[0]!r} is supported.")
        num_rows = self._places[_EMBEDDING].shape[0]
        return PortableConfig(model_of(_fields(self.path, values)), num_rows, num_rows)


def is_megatron_deepspeed(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of Megatron-DeepSpeed, or of this program, or holds one."""
    path = newest_checkpoint(path)
    return path.is_dir() and ((path / _MODEL_FILE).is_file() or any(path.glob("layer_*-model_*-model_states.pt")))


def _fields(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig, of upstream's arguments."""
    missing = [name for name in _SIZES if values.get(name) is None]
    if missing:
        raise WeightsError(f"{path} has args without {', '.join(missing)}; use a checkpoint of Megatron-DeepSpeed.")
    rotary = bool(values.get("use_rotary_position_embeddings", False))
    swiglu = bool(values.get("swiglu", False))
    tanh = not swiglu and bool(values.get("openai_gelu", False) or values.get("bias_gelu_fusion", False))
    return {
        **{name: values[name] for name in _SIZES},
        **{name: bool(values.get(name, False)) for name in _SWITCHES},
        "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "normalization": values.get("normalization", "layernorm"),
        "disable_bias_linear": not values.get("add_bias_linear", True),
        "openai_gelu": tanh,
        **({"rotary_position_embeddings_theta": float(values.get("rope_theta") or 10000)} if rotary else {}),
        **({"rotary_percent": float(values.get("rotary_percent", 1.0))} if rotary else {}),
    }


def _layer_files(path: Path) -> list[Path]:
    """Files of a pipeline's layers by their number; WeightsError if tensors were split over ranks."""
    found = {}
    for file in path.glob("layer_*-model_*-model_states.pt"):
        match = _LAYER_FILE.search(file.name)
        if match is None:
            continue
        if int(match[2]):
            raise WeightsError(
                f"{file} is of a model split by tensor parallelism, and tensor-parallel size 1 is supported; merge it "
                "with Megatron-DeepSpeed's tools first."
            )
        found[int(match[1])] = file
    return [found[number] for number in sorted(found)]


def _arguments(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Upstream's command line, by name."""
    arguments = content.get("args")
    values = arguments if isinstance(arguments, dict) else vars(arguments) if isinstance(arguments, _Inert) else {}
    if not values:
        raise WeightsError(
            f"{path / _MODEL_FILE} has no args of Megatron-DeepSpeed, which describe the architecture; a checkpoint "
            "of this program is turned into portable weights by tools/consolidate_checkpoint.py."
        )
    return values


def _of_model(file: Path, module: Mapping[str, Any]) -> dict[str, _Place]:
    """A model in one file, nested or flat."""
    places = {}
    for key, tensor in _tensors({"module": module}):
        name = key.removeprefix("module.")
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        if not any(copy in name for copy in _COPIES):
            places[name] = _Place(file, key, tuple(tensor.shape), tensor.dtype)
    return places


def _of_layers(files: Sequence[Path]) -> dict[str, _Place]:
    """A pipeline's layers: what each is, its tensors tell."""
    places = {}
    num_blocks = 0
    for file in files:
        tensors = dict(_tensors(_load(file)))
        is_block = any(".query_key_value." in key for key in tensors)
        rename = _renaming(tensors, num_blocks)
        num_blocks += is_block
        for key, tensor in tensors.items():
            if not any(copy in key for copy in _COPIES):
                places[rename(key)] = _Place(file, key, tuple(tensor.shape), tensor.dtype)
    return places


def _renaming(tensors: Mapping[str, Tensor], num_blocks: int) -> Callable[[str], str]:
    """From the names in a layer's file to ours."""
    if any(".query_key_value." in key for key in tensors):
        return lambda key: f"layers.{num_blocks}.{re.sub(r'^attention[.]', 'self_attention.', key)}"
    if "word_embeddings.weight" in tensors:
        return lambda key: f"embedding.{key}"
    if any(tensor.dim() == 2 for tensor in tensors.values()):
        return lambda key: f"head.output_layer.{key.removeprefix('lm_head.')}"
    return lambda key: f"head.final_layernorm.{key}"


def _tensors(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested mappings, each with its dotted name."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")


class _Inert:
    """Stands for any class that a pickle names: keeps its attributes and does nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _load(file: Path) -> Any:
    """Map a file of torch.save; WeightsError if it is damaged."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(type("Inert", (_Inert,), {}), name) for name in names]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged file shows itself in many ways, all of them inside torch
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"{file} cannot be read ({lines[0]}); copy it again, or name another checkpoint.") from error
