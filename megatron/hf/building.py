"""Construction of a Hugging Face model that is executed as a stream, or as Ulysses does."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.head_layout import HeadLayout
from megatron.core.parallel_state import ParallelState
from megatron.hf.attention import register
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.experts import use_grouped_experts
from megatron.hf.fusion import fuse_modules
from megatron.hf.inspection import ModelFacts, decoder_layers, inspect_model
from megatron.hf.model import HuggingFaceModel
from megatron.hf.routing import AuxiliaryLoss, Routing
from megatron.hf.skeleton import Skeleton
from megatron.model.builder import Execution, execution_on
from megatron.ops.attention import AttentionBackend, AttentionRequest, choose_backend

Model = TypeVar("Model", bound=HuggingFaceModel)


def build_hugging_face_model(
    model: Any,
    parallel_state: ParallelState,
    execution: Execution,
    backend: str = "auto",
    kind: type[Model] = HuggingFaceModel,  # type: ignore[assignment]
) -> Model:
    """Take over a transformers model, which then runs as `execution` says.

    Raises:
        UnsupportedModelError: the stream would compute the model wrongly.
        AttentionUnavailable: no attention kernel, or not the one called `backend`, serves the model.
    """
    register()
    use_grouped_experts(model)
    auxiliary_loss = AuxiliaryLoss.taken_from(model)
    skeleton = Skeleton(model, decoder_layers(model))
    facts = inspect_model(skeleton)
    fuse_modules(model)
    if execution.fpdt and model.training and any(layer.dropout for layer in facts.layers):
        raise UnsupportedModelError("attention dropout cannot be replayed by FPDT; set attention_dropout to 0")
    heads = _heads(facts, parallel_state.sequence_parallel_size)
    parameter = next(model.parameters())
    attention = _backend(backend, facts, parameter, execution.documents or heads.num_row_shares > 1)
    how = execution_on(execution, parallel_state, heads, attention, parameter.device, sys.maxsize)
    streamed = kind(skeleton, facts, how)
    everyone = dist.group.WORLD if parallel_state.world_size > 1 else None
    streamed.routing = Routing.of(model, auxiliary_loss, execution.fpdt, everyone)
    for layer in streamed.layers:
        how.attach(layer)  # type: ignore[arg-type]
    return streamed


def _heads(facts: ModelFacts, num_ranks: int) -> HeadLayout:
    """Return the heads over the ranks of a sequence, which are those of every layer."""
    heads = {(layer.num_heads, layer.num_key_value_heads) for layer in facts.layers}
    if len(heads) > 1:
        raise UnsupportedModelError(f"layers with different numbers of heads are not supported: {sorted(heads)}")
    return HeadLayout(*heads.pop(), num_ranks)


def _backend(name: str, facts: ModelFacts, parameter: nn.Parameter, short_tiles: bool) -> AttentionBackend:
    """Return the attention backend that serves every layer."""
    size = max(layer.head_size for layer in facts.layers)
    variants = tuple(dict.fromkeys(layer.variant for layer in facts.layers))
    deterministic = torch.are_deterministic_algorithms_enabled()
    request = AttentionRequest(parameter.device, parameter.dtype, size, variants, deterministic)
    return choose_backend(name, request, short_tiles)
