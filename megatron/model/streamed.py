"""Streamed (FPDT) execution of a model: everything runs chunk by chunk and is stored on the stream's tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megatron.fpdt.block import StreamedBlock
from megatron.fpdt.block_chain import BlockChain
from megatron.fpdt.loss import StreamableHead, stream_loss
from megatron.fpdt.seam import StreamedAttention
from megatron.fpdt.stream import Stream
from megatron.fpdt.tokenwise import StreamableEmbedding, stream_embedding

if TYPE_CHECKING:
    from megatron.model.transformer import ExecutableLayer


class StreamedExecution:
    """Runs embedding, layers and loss chunk by chunk."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.store = stream.store
        self._chain = BlockChain(stream)

    def attach(self, layer: ExecutableLayer) -> None:
        """Replace the layer's `forward` and its core attention."""
        layer.set_core_attention(StreamedAttention())
        layer.forward = StreamedBlock(self.stream, layer, self._chain)

    def embedding(self, module: StreamableEmbedding, tokens_BS: Tensor, positions_BS: Tensor, anchor: Tensor) -> Tensor:
        return stream_embedding(self.stream, module, tokens_BS, positions_BS, anchor)

    def loss(self, module: StreamableHead, x_SBh: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return stream_loss(self.stream, module, x_SBh, labels_BS, mask_BS)
