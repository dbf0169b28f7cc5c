"""What a model's own mask function lets a token attend to: all tokens before it, a window, or its block of tokens.

A mask function says for any pair of positions whether they attend. It is compared with each pattern that the stream
has at positions around the borders of that pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.hf.attention import MaskStandIn, Settings
from megatron.hf.errors import UnsupportedModelError
from megatron.ops.attention import AttentionVariant


@dataclass(frozen=True)
class LayerMask:
    """A token attends to tokens up to itself: to all, to the last `window`, or to those of its `local_block` tokens."""

    window: int | None = None
    local_block: int | None = None

    def allows(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return which pairs of positions attend."""
        allowed = keys <= queries
        if self.window is not None:
            allowed = allowed & (keys > queries - self.window)
        if self.local_block is not None:
            allowed = allowed & (keys // self.local_block == queries // self.local_block)
        return allowed

    def variant(self, scale: float, softcap: float | None) -> AttentionVariant:
        """Return how a sequence attends with this mask."""
        return AttentionVariant(scale, softcap, self.window, self.local_block)


def mask_of(mask: MaskStandIn, settings: Settings, name: str) -> LayerMask:
    """Return the pattern of a model's mask. UnsupportedModelError, which names the layer, if it has no such pattern."""
    sizes = sorted({size for size in (settings.sliding_window, mask.local_size) if size is not None})
    patterns = [LayerMask(window=size) for size in sizes] + [LayerMask(local_block=size) for size in sizes]
    edges = {multiple * size + step for size in (1, 64, *sizes) for multiple in range(4) for step in (-1, 0, 1)}
    positions = torch.tensor(sorted(edge for edge in edges if edge >= 0), device=mask.device)
    queries, keys = positions[:, None], positions[None]
    zero = positions[0]
    try:
        allowed = mask.allows(zero, zero, queries, keys).broadcast_to(len(positions), len(positions))
    except Exception as error:
        raise UnsupportedModelError(f"the mask of {name} cannot be evaluated: {error}") from error
    for pattern in [LayerMask(), *patterns]:
        if torch.equal(allowed, pattern.allows(queries, keys)):
            return pattern
    raise UnsupportedModelError(
        f"the mask of {name} is none that the stream has: all earlier tokens, a window or a block of them"
    )
