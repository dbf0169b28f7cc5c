"""KV cache of one sequence: keys and values of every layer, from the first token to the latest.

    prefilled chunks    on the store's tier, one tensor [C, 1, 2K, D] per layer and chunk
    single tokens       on the device, in a buffer per layer; a full buffer is stored on the tier as a chunk

Cached keys and values include their positions, so attention can process the parts in any order.

    C tokens of a part, K key/value heads, D head size
"""

from __future__ import annotations

from torch import Tensor

from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.store import ChunkStore

# Few enough to be stored on the device for all layers, enough for one tile per step.
BUFFER_TOKENS = 1024


class KeyValueCache:
    """Keys and values of the tokens so far; `length` counts the tokens."""

    def __init__(self, store: ChunkStore, num_layers: int, buffer_tokens: int = BUFFER_TOKENS) -> None:
        self.length = 0
        self._store = store
        self._buffer_tokens = buffer_tokens
        self._chunks: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._buffers: list[Tensor | None] = [None] * num_layers
        self._num_buffered = 0

    def parts(self, layer: int) -> list[Tensor]:
        """Return the keys and values of a layer, parts of [C, 1, 2K, D] each, on the tier or on the device."""
        buffer = self._buffers[layer]
        return self._chunks[layer] + ([] if buffer is None else [buffer[: self._num_buffered]])

    def add(self, layer: int, kv_C1KD: Tensor) -> None:
        """Add the keys and values of new tokens of one layer. They must not be written to afterwards."""
        if len(kv_C1KD) > 1:
            self._add_chunk(layer, kv_C1KD)
            return
        buffer = self._buffers[layer]
        if buffer is None:
            buffer = self._buffers[layer] = kv_C1KD.new_empty((self._buffer_tokens, *kv_C1KD.shape[1:]))
        buffer[self._num_buffered].copy_(kv_C1KD[0])

    def advance(self, num_tokens: int) -> None:
        """Count new tokens, after all layers have added them."""
        self.length += num_tokens
        if num_tokens == 1:
            self._num_buffered += 1
        if self._num_buffered == self._buffer_tokens:
            self._empty_buffers()

    def forget(self) -> None:
        """Drop all keys and values: the next tokens attend to none of them, and keep their own positions."""
        num_layers = len(self._chunks)
        self._chunks, self._buffers, self._num_buffered = [[] for _ in range(num_layers)], [None] * num_layers, 0

    def _add_chunk(self, layer: int, kv_C1KD: Tensor) -> None:
        self._chunks[layer].append(self._store.add(kv_C1KD, ChunkKind.KEYS_VALUES))

    def _empty_buffers(self) -> None:
        for layer, buffer in enumerate(self._buffers):
            assert buffer is not None, "tokens are counted after every layer has them"
            self._add_chunk(layer, buffer)
        self._buffers, self._num_buffered = [None] * len(self._buffers), 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts, on the device and on the tier."""
        return sum(part.nbytes for layer in range(len(self._chunks)) for part in self.parts(layer))
