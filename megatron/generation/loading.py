"""Loading of weights of any supported format into a model that generates, on one device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron.core.parallel_state import ParallelState
from megatron.fpdt.device_budget import DeviceBudget
from megatron.generation.cached_model import CachedModel
from megatron.generation.errors import GenerationError
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from megatron.weights.model_opening import fill_model, open_model
from megatron.weights.portable_config import PortableConfig
from megatron.weights.source import WeightSource


@dataclass(frozen=True)
class Inference:
    """The device, dtype and memory with which a model runs."""

    device: torch.device
    dtype: torch.dtype
    chunk_size: int = 65536
    offloading: bool = False
    device_memory_bytes: int = 0
    host_memory_bytes: int | None = None
    isolated_chunks: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise GenerationError(
                f"--ds-sequence-parallel-fpdt-chunk-size ({self.chunk_size}) must be 1 or more; use for example 16384."
            )


class OpenedModel:
    """A model whose tensors are not read yet; WeightsError if `path` has none, or not as it was written."""

    def __init__(self, path: Path, with_hashes: bool = True) -> None:
        self.portable: PortableConfig
        self._source: WeightSource
        self.portable, self._source = open_model(path, with_hashes)

    @property
    def num_ids(self) -> int:
        """Number of ids that have their own row in the embedding."""
        return self.portable.vocab_size

    @property
    def max_length(self) -> int | None:
        """Number of learned positions; None if the model has RoPE."""
        model = self.portable.model
        return None if model.use_rotary_position_embeddings else model.max_position_embeddings

    def build(self, inference: Inference, longest: int, num_ids: int | None = None) -> CachedModel:
        """Read the weights and build the model, for sequences of at most `longest` tokens and ids below `num_ids`.

        Dynamic RoPE scaling depends on the sequence length; it uses `longest`.

        Raises:
            WeightsError: a tensor is absent, unknown or of another shape.
            AttentionUnavailable: no kernel serves the dtype on the device.
        """
        portable = self.portable
        config = replace(portable.model, seq_length=longest, attention_dropout=0.0, hidden_dropout=0.0)
        execution = Execution(
            fpdt=True,
            chunk_size=inference.chunk_size,
            offloading=inference.offloading,
            device_budget=DeviceBudget(inference.device_memory_bytes),
            host_memory_bytes=inference.host_memory_bytes,
        )
        initialization = Initialization(inference.dtype, inference.device)
        model = build_model(config, portable.padded_vocab_size, ParallelState(), execution, initialization).eval()
        fill_model(model, portable, self._source)
        return CachedModel(model, min(self.num_ids, num_ids or self.num_ids), inference.isolated_chunks)
