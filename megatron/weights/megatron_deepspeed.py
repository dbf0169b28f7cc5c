"""Upstream Megatron-DeepSpeed checkpoints as a source of weights under our names.

Any ZeRO stage is read, with or without tensor and pipeline parallelism. Queries, keys and values are stored in our
order (since checkpoint_version 2.0), and so are gate and up within a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.weights.errors import WeightsError
from megatron.weights.megatron_deepspeed_files import Inert, find_places, has_layer_files, load, main_file
from megatron.weights.opening import newest_checkpoint
from megatron.weights.portable_config import PortableConfig, model_of
from megatron.weights.tensor_parallel import merge, merged_shape
from megatron.weights.torch_files import MappedFiles

_EMBEDDING = "embedding.word_embeddings.weight"
_SUPPORTED = {
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "embed_layernorm": (False,),
    "use_alibi_position_embeddings": (False,),
    "squared_relu": (False,),
    "geglu": (False,),
    "glu_activation": (None,),
    "rotary_interleaved": (False,),
    "num_experts": (None, 1, [1]),
    "mlp_type": ("standard",),
}
# Same name and meaning as in ModelConfig.
_SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings",
    "layernorm_epsilon",
)  # fmt: skip
_SWITCHES = ("use_rotary_position_embeddings", "swiglu", "untie_embeddings_and_output_weights")


class MegatronDeepSpeedCheckpoint:
    """The weights of a folder global_stepN, or of the folder whose `latest` names one."""

    def __init__(self, path: Path) -> None:
        """WeightsError if there is no such checkpoint, a file of it is missing, or its model is not supported."""
        self.path = newest_checkpoint(path)
        file = main_file(self.path)
        if file is None:
            raise WeightsError(
                f"{self.path} has no mp_rank_00_model_states.pt, which holds the architecture; copy it there."
            )
        content = load(file)
        self._arguments = _arguments(file, content)
        version = content.get("checkpoint_version", 3.0)
        if float(version) < 2.0:
            raise WeightsError(f"{self.path} has checkpoint_version {version}, and 2.0 and later are supported.")
        self._files = MappedFiles(read=load)
        self._ranks = find_places(self.path, self._degree("tensor_model_parallel_size"))
        if self._degree("pipeline_model_parallel_size") > 1 and not has_layer_files(self.path):
            raise WeightsError(f"{self.path} lacks its layer_NN-model_RR-model_states.pt; copy the files of all ranks.")
        if _EMBEDDING not in self._ranks[0]:
            raise WeightsError(f"{self.path} holds no weights of a GPT; name a checkpoint global_stepN.")
        self._check_ranks()

    @property
    def names(self) -> Sequence[str]:
        """All parameter names, sorted."""
        return tuple(sorted(self._ranks[0]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, without reading it."""
        return merged_shape(name, self._ranks[0][name].shape, len(self._ranks))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter, without reading it: fp32 at ZeRO-3, which saves only the master weights."""
        return self._ranks[0][name].dtype

    def get(self, name: str) -> Tensor:
        """Read one parameter into CPU memory of its own; WeightsError if ranks differ in a tensor that they share."""
        parts = [places[name].read(self._files) for places in self._ranks]
        return merge(name, parts, bool(self._arguments.get("swiglu", False)))

    def config(self) -> PortableConfig:
        """Return the architecture that upstream's arguments describe; WeightsError if it is not supported."""
        values = self._arguments
        for name, allowed in _SUPPORTED.items():
            value = values.get(name, allowed[0])
            if value not in allowed:
                raise WeightsError(f"{self.path} has {name} {value!r}, and {allowed[0]!r} is supported.")
        num_rows = self.shape(_EMBEDDING)[0]
        expected = values.get("padded_vocab_size") or num_rows
        if num_rows != expected:
            raise WeightsError(
                f"{self.path} has {num_rows} rows in its embedding, and its args say padded_vocab_size {expected}; "
                "copy the files of one checkpoint."
            )
        return PortableConfig(model_of(_fields(self.path, values)), num_rows, num_rows)

    def _degree(self, name: str) -> int:
        degree = self._arguments.get(name, 1)
        if type(degree) is not int or degree < 1:
            raise WeightsError(f"{self.path} has {name} {degree!r}, which must be a whole number above 0.")
        return degree

    def _check_ranks(self) -> None:
        """Raise WeightsError unless all ranks have the same tensors in the same shapes."""
        for rank, places in enumerate(self._ranks):
            for name in sorted(set(places) ^ set(self._ranks[0])):
                raise WeightsError(f"{self.path} has {name} on one of the tensor-parallel ranks 0 and {rank} alone.")
            for name, place in places.items():
                first = self._ranks[0][name]
                if (place.shape, place.dtype) != (first.shape, first.dtype):
                    raise WeightsError(
                        f"{self.path} has {name} in {list(first.shape)} on the tensor-parallel rank 0 and in "
                        f"{list(place.shape)} on rank {rank}; copy the files of one checkpoint."
                    )


def is_megatron_deepspeed(path: Path) -> bool:
    """Return whether a folder is or holds what looks like a checkpoint of Megatron-DeepSpeed or of this program."""
    path = newest_checkpoint(path)
    return path.is_dir() and (main_file(path) is not None or has_layer_files(path))


def _fields(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert upstream's arguments to fields of ModelConfig."""
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


def _arguments(file: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return upstream's command-line arguments, by name."""
    arguments = content.get("args")
    values = arguments if isinstance(arguments, dict) else vars(arguments) if isinstance(arguments, Inert) else {}
    if not values:
        raise WeightsError(
            f"{file} has no args of Megatron-DeepSpeed, which describe the architecture; a checkpoint "
            "of this program is turned into portable weights by tools/consolidate_checkpoint.py."
        )
    return values
