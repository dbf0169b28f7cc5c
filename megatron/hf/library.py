"""A transformers model that runs as a stream, for programs with a training loop of their own."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config import default_chunk
from megatron.core.documents import Documents
from megatron.core.parallel_state import ParallelState
from megatron.hf.building import build_hugging_face_model
from megatron.hf.model import HuggingFaceModel
from megatron.model.builder import Execution
from megatron.model.streamed import StreamedExecution


class StreamedModel(HuggingFaceModel):
    """A Hugging Face decoder that takes whole sequences and returns their mean loss. Built by `stream_model`."""

    parallel_state: ParallelState

    def forward(  # type: ignore[override]
        self, tokens_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor | None = None, positions_BS: Tensor | None = None
    ) -> Tensor:
        """Compute the mean loss of the tokens that count, a scalar in fp32 (fp64 for fp64).

        Tokens and labels int64 [B, S] are whole sequences, on any device; labels are the next tokens. `mask` [B, S]
        weighs the losses; by default a label of -100 has none. `positions` int64 [B, S] that restart at 0 begin a new
        document, which attends to itself only; by default each sequence is one document. If ranks share a sequence,
        each gives all of it, and the loss and its gradients are the rank's share: their sums over the ranks are whole.
        ValueError if the positions of a sequence do not begin with 0.
        """
        mask_BS = (labels_BS != -100) if mask_BS is None else mask_BS
        documents = None
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1]).expand(tokens_BS.shape)
        else:
            starts = [row.nonzero()[:, 0].tolist() for row in positions_BS.cpu() == 0]
            if any(row[:1] != [0] for row in starts):
                raise ValueError("the positions of each sequence must begin with 0, as its first document does")
            documents = Documents.from_starts(starts, tokens_BS.shape[1])
        inputs = (tokens_BS, labels_BS.clamp_min(0), mask_BS, positions_BS)
        tokens, labels, mask, positions = (self._own(t) for t in inputs)
        return super().forward(tokens, labels, mask, positions, documents) / mask_BS.sum()

    def _own(self, of_tokens_BS: Tensor) -> Tensor:
        """Return this rank's part of whole sequences; in pinned memory if a GPU is to copy it from the host."""
        stream = cast(StreamedExecution, self.execution).stream
        layout, rank = stream.layout_of(of_tokens_BS.shape[1]), self.parallel_state.sequence_parallel_rank
        own = of_tokens_BS[:, layout.owned_positions(rank).to(of_tokens_BS.device)]
        return own.pin_memory() if stream.store.device.type == "cuda" and not own.is_cuda else own


def stream_model(
    model: Any,
    chunk_size: int | None = None,
    offloading: bool | None = None,
    sequence_parallel_size: int = 1,
    attention_backend: str = "auto",
) -> StreamedModel:
    """Take over a transformers model, so that it runs chunk by chunk at any length.

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
        streamed = stream_model(model)
        optimizer = torch.optim.AdamW(streamed.parameters())
        streamed(tokens, labels).backward()
        optimizer.step()

    The parameters stay those of `model`, which is saved as before. A chunk has `chunk_size` tokens of the sequence, by
    default as many as suit the ranks; with `offloading`, by default on a GPU, chunks are stored in host memory.
    `sequence_parallel_size` ranks of an existing process group share each sequence; all ranks call this function.

    Raises:
        UnsupportedModelError: the stream would compute the model wrongly.
        AttentionUnavailable: no attention kernel, or not the one called `attention_backend`, serves the model.
    """
    device = next(model.parameters()).device
    execution = Execution(
        fpdt=True,
        chunk_size=chunk_size or default_chunk(sequence_parallel_size),
        offloading=device.type == "cuda" if offloading is None else offloading,
        documents=True,
    )
    parallel_state = ParallelState.create(sequence_parallel_size) if dist.is_initialized() else ParallelState()
    streamed = build_hugging_face_model(model, parallel_state, execution, attention_backend, StreamedModel)
    streamed.parallel_state = parallel_state
    if streamed.routing is not None:
        streamed.routing.group = parallel_state.sequence_parallel_group
    return streamed
