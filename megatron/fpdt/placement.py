"""Placement of a training step's chunks: which are stored on the device, which on the host.

A chunk is stored on the device if the device budget has room for its kind when it is allocated, else on the host. So
the order in which a step allocates and releases its chunks decides. This module replays that order:

    embedding    x
    forward      y, kv, o and lse, products; kv is released where it is recomputed, x where it is rebuilt
    loss         dy beside y, scaled as dy'
    backward     where attention is recomputed, y, kv, o and lse of each block of the chain, and no y of the highest;
                 rebuilt inputs of the chain, dx, recomputed kv, dkv; then all that the block has used is released

Gradients of hidden states are stored with the hidden states, whatever the budget. Products are small beside the rest,
and counted as one tensor that both may share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron.config import Recompute
from megatron.fpdt.device_budget import ChunkKind, DeviceBudget, DeviceUse
from megatron.fpdt.memory_model import StreamShape


class HostBytes(NamedTuple):
    """The bytes of one block's tensors on the host."""

    x: int
    y: int
    attention: int  # o and lse
    products: int
    kv: int  # of the forward pass
    kv_backward: int  # the same, unless it is recomputed
    dkv: int
    dx: int
    dy: int
    x_again: int  # of the recomputed forward pass; 0 without one
    kv_again: int
    y_again: int


@dataclass(frozen=True)
class Placement:
    """The most bytes of chunks by place, on the device by phase, and what each block has on the host."""

    forward_device_bytes: int
    loss_device_bytes: int
    backward_device_bytes: int
    host_bytes: int
    blocks: tuple[HostBytes, ...]


class _Stored(NamedTuple):
    """The bytes of a tensor by place."""

    kind: ChunkKind
    on_device: int
    on_host: int


_NOTHING = _Stored(ChunkKind.HIDDEN_STATES, 0, 0)


class _Tiers:
    """The device, within its budget, and the host."""

    def __init__(self, device_budget: DeviceBudget) -> None:
        self._device = DeviceUse(device_budget)
        self._on_host = self._most_on_device = self.most_on_host = 0

    def end_of_phase(self) -> int:
        """Return the most bytes on the device since the last call."""
        most, self._most_on_device = self._most_on_device, self._device.total_bytes
        return most

    def store(self, kind: ChunkKind, num_bytes: int) -> _Stored:
        """Store a tensor as `ChunkStore.empty` does."""
        return self._add(kind, num_bytes, num_bytes if self._device.has_room(num_bytes, kind) else 0)

    def store_gradient(self, x: _Stored) -> _Stored:
        """Store a gradient of hidden states with them."""
        return self._add(ChunkKind.HIDDEN_GRADIENTS, x.on_device + x.on_host, x.on_device)

    def store_chunks(self, kind: ChunkKind, chunks: Sequence[int]) -> _Stored:
        """Store chunks, of these bytes each, as `ChunkStore.add` does."""
        room = max(self._device.room_bytes(kind), 0)
        on_device, needed = 0, sum(chunks)
        for chunk in chunks if needed > room else ():
            on_device += chunk if on_device + chunk <= room else 0
        return self._add(kind, needed, needed if needed <= room else on_device)

    def store_products(self, num_bytes: int) -> _Stored:
        """Store many small tensors: the device takes what it has room for."""
        room = max(self._device.room_bytes(ChunkKind.PRODUCTS), 0)
        return self._add(ChunkKind.PRODUCTS, num_bytes, min(num_bytes, room))

    def store_on_device(self, kind: ChunkKind, chunks: Sequence[int]) -> _Stored:
        """Store those of the chunks, of these bytes each, that the device has room for."""
        room, on_device = self._device.room_bytes(kind), 0
        for chunk in chunks:
            on_device += chunk if on_device + chunk <= room else 0
        return self._add(kind, on_device, on_device)

    def release(self, tensors: Iterable[_Stored]) -> None:
        for kind, on_device, on_host in tensors:
            self._device.add(-on_device, kind)
            self._on_host -= on_host

    def _add(self, kind: ChunkKind, num_bytes: int, on_device: int) -> _Stored:
        self._device.add(on_device, kind)
        self._on_host += num_bytes - on_device
        self._most_on_device = max(self._most_on_device, self._device.total_bytes)
        self.most_on_host = max(self.most_on_host, self._on_host)
        return _Stored(kind, on_device, num_bytes - on_device)


class _Block(NamedTuple):
    """What the forward pass of a block has stored, and the recomputed forward pass."""

    x: _Stored
    y: _Stored
    kv: _Stored
    attention: _Stored
    products: _Stored
    first_products: _Stored
    saved_kv: _Stored | None  # until the backward pass
    x_again: _Stored = _NOTHING
    kv_again: _Stored = _NOTHING
    y_again: _Stored = _NOTHING


@lru_cache(maxsize=256)
def place(shape: StreamShape, recompute: Recompute, interval: int, device_bytes: int) -> Placement:
    """Replay a step that saves the input of every `interval`-th block, with so many bytes for chunks on the device."""
    tiers = _Tiers(shape.device_budget(device_bytes, interval, recompute))
    blocks, x = [], tiers.store(ChunkKind.HIDDEN_STATES, shape.residual_bytes)
    for index in range(shape.num_layers):
        blocks.append(_forward(tiers, shape, recompute, x))
        if index % interval:
            tiers.release([x])
        x = blocks[-1].y
    forward = tiers.end_of_phase()
    unscaled = tiers.store_gradient(x)
    tiers.release([x])
    dy = tiers.store_gradient(x)
    tiers.release([unscaled])
    loss = tiers.end_of_phase()
    on_host: list[HostBytes] = []
    inputs: dict[int, _Stored] = {}  # of the chain, by position; not the saved one
    for index in reversed(range(shape.num_layers)):
        position = index % interval
        if not recompute.saves_attention and (index == shape.num_layers - 1 or position == interval - 1):
            chain = slice(index - position, index + 1)
            blocks[chain], inputs = _recompute(tiers, shape, blocks[chain])
        if position and position not in inputs:
            inputs = {n: tiers.store(ChunkKind.HIDDEN_STATES, shape.residual_bytes) for n in range(1, position + 1)}
        block = blocks[index]
        x = inputs.pop(position) if position else block.x
        dx = tiers.store_gradient(block.x)
        kv = block.saved_kv or tiers.store_chunks(ChunkKind.KEYS_VALUES, shape.key_value_chunks)
        dkv = tiers.store_chunks(ChunkKind.KEY_VALUE_GRADIENTS, shape.key_value_gradient_chunks)
        tiers.release([x, dy, kv, dkv, block.attention, block.products, block.first_products])
        tensors = (x, block.y, block.attention, block.products, block.kv, kv, dkv, dx, dy)
        on_host.append(HostBytes(*(each.on_host for each in (*tensors, block.x_again, block.kv_again, block.y_again))))
        dy = dx
    return Placement(forward, loss, tiers.end_of_phase(), tiers.most_on_host, tuple(on_host[::-1]))


def _forward(tiers: _Tiers, shape: StreamShape, recompute: Recompute, x: _Stored) -> _Block:
    y = tiers.store(ChunkKind.HIDDEN_STATES, shape.residual_bytes)
    kv = tiers.store_chunks(ChunkKind.KEYS_VALUES, shape.key_value_chunks)
    attention, saved_kv = _NOTHING, None
    if recompute.saves_attention:
        attention = tiers.store_chunks(ChunkKind.ATTENTION_OUTPUTS, shape.attention_chunks)
    products = tiers.store_products(shape.product_bytes(recompute))
    first_products = tiers.store_on_device(ChunkKind.FIRST_PRODUCTS, shape.first_product_chunks(recompute))
    if recompute.saves_keys_and_values:
        saved_kv = kv
    else:
        tiers.release([kv])
    return _Block(x, y, kv, attention, products, first_products, saved_kv)


def _recompute(tiers: _Tiers, shape: StreamShape, chain: list[_Block]) -> tuple[list[_Block], dict[int, _Stored]]:
    """Recompute the forward passes of a chain, as `BlockInputs` does; return the inputs that are saved, too."""
    x, recomputed, inputs = chain[0].x, [], {}
    num_rebuilt = (len(chain) - 1) // 2
    for position, block in enumerate(chain):
        is_highest = position == len(chain) - 1
        y = _NOTHING if is_highest else tiers.store(ChunkKind.HIDDEN_STATES, shape.residual_bytes)
        kv = tiers.store_chunks(ChunkKind.KEYS_VALUES, shape.key_value_chunks)
        attention = tiers.store_chunks(ChunkKind.ATTENTION_OUTPUTS, shape.attention_chunks)
        saved_kv = kv if is_highest else None
        recomputed.append(block._replace(attention=attention, saved_kv=saved_kv, x_again=x, kv_again=kv, y_again=y))
        if position > num_rebuilt:
            inputs[position] = x
        elif position:
            tiers.release([x])
        if not is_highest:
            tiers.release([kv])
        x = y
    return recomputed, inputs
