"""The attention of transformers' layers: one function, registered with transformers, that passes each call on.

    q [B, H, T, D]     k [B, K, T, D]     v [B, K, T, E], whose heads may have another size (MLA)

transformers gives an attention function q, k and v, a mask, and how to attend as keyword arguments. Those that say
something about attention are part of the call; any other is refused by its name, since ignoring it would be wrong in
silence. A model makes no masks for this function. For inspection (megatron.hf.inspection) it makes stand-ins, which
hold the model's own mask function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from megatron.hf.errors import UnsupportedModelError

# Names under which transformers' models find the attention function: without masks, and with stand-ins of masks.
STREAMED, INSPECTED = "fpdt", "fpdt-inspection"

# Arguments that models pass through their attention to every function, and that change nothing about it.
_NEUTRAL = frozenset(
    (
        "position_ids",
        "position_embeddings",
        "cache",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "layer_idx",
    )
)


class Settings(NamedTuple):
    """How a layer asks to attend, apart from its mask."""

    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None


class LayerCall(NamedTuple):
    """A layer's call of the attention function."""

    module: nn.Module
    q_BHTD: Tensor
    k_BKTD: Tensor
    v_BKTE: Tensor
    mask: object
    settings: Settings
    sinks_H: Tensor | None
    dropout: float


class MaskStandIn:
    """Stands in for a mask: the function of (batch, head, query, key) that says which pairs attend."""

    def __init__(self, mask_function: Callable[..., Any], local_size: int | None, device: torch.device) -> None:
        self.allows, self.local_size, self.device = mask_function, local_size, device


Attend = Callable[[LayerCall], Tensor]

_attend: ContextVar[Attend] = ContextVar("attend_of_transformers")


def register() -> None:
    """Register the attention function with transformers, under both names."""
    for name in (STREAMED, INSPECTED):
        AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(INSPECTED, stand_in)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Let `attend` serve the attention calls in this context (of the thread or greenlet); it returns o [B, T, H, E]."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


@torch.compiler.disable
def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **how: Any
) -> tuple[Tensor, None]:
    """Pass a layer's call on. UnsupportedModelError for a keyword argument that is not understood."""
    attend = _attend.get(None)
    if attend is None:
        raise RuntimeError("a layer of a streamed model runs outside of the stream; call the model that streams it")
    settings = Settings(how.pop("scaling", None), how.pop("sliding_window", None), how.pop("softcap", None))
    sinks, dropout = how.pop("s_aux", None), how.pop("dropout", 0.0)
    if how.pop("is_causal", None) is False:
        raise UnsupportedModelError(f"{type(module).__name__} asks for attention to later tokens (is_causal=False)")
    given = (name for name, value in how.items() if value is not None and value is not False)
    unknown = sorted(name for name in given if name not in _NEUTRAL)
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which the stream does not know"
        )
    return attend(LayerCall(module, query, key, value, attention_mask, settings, sinks, dropout)), None


def stand_in(
    mask_function: Callable[..., Any], device: torch.device, local_size: int | None = None, **others: Any
) -> MaskStandIn:
    """Take the place of transformers' functions that create masks."""
    return MaskStandIn(mask_function, local_size, device)
