"""From a configuration to a model: the only place that asks whether it is executed as a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.config import ModelConfig, Recompute
from megatron.core.documents import Documents
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.block import stream_block
from megatron.fpdt.loss import stream_loss
from megatron.fpdt.store import ChunkStore
from megatron.fpdt.stream import ProgressReport, Stream, no_report
from megatron.fpdt.tokenwise import stream_embedding
from megatron.model.initialization import Initializer
from megatron.model.plain import PlainExecution
from megatron.model.transformer import GPTModel
from megatron.ops.attention import choose_backend

if TYPE_CHECKING:
    from megatron.model.transformer import LanguageModelHead, TokenEmbedding, TransformerLayer


@dataclass(frozen=True)
class Execution:
    """How a model is to be executed; its parameters and results do not depend on it.

    The memory is what FPDT's chunks may take up with offloading: on the device first, then on the host. `recompute`
    and `checkpoint_in_cpu` are activation checkpointing without FPDT. `documents` says that batches may hold some that
    do not see each other.
    """

    fpdt: bool = False
    chunk_size: int = 65536
    offloading: bool = False
    device_memory_bytes: int = 0
    host_memory_bytes: int | None = None
    checkpoint_interval: int = 1
    fpdt_recompute: Recompute = "all"
    recompute: bool = False
    checkpoint_in_cpu: bool = False
    documents: bool = False


class StreamedExecution:
    """Runs every piece chunk by chunk; the residual stream rests on the store's tier."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.store = stream.store

    def embedding(self, module: TokenEmbedding, tokens_BS: Tensor, positions_BS: Tensor, anchor: Tensor) -> Tensor:
        return stream_embedding(self.stream, module, tokens_BS, positions_BS, anchor)

    def block(
        self, module: TransformerLayer, x_SBh: Tensor, positions_BS: Tensor, documents: Documents | None
    ) -> Tensor:
        return stream_block(self.stream, module, x_SBh, positions_BS, documents)

    def loss(self, module: LanguageModelHead, x_SBh: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return stream_loss(self.stream, module, x_SBh, labels_BS, mask_BS)


def build_execution(
    config: ModelConfig,
    parallel_state: ParallelState,
    execution: Execution,
    dtype: torch.dtype,
    device: torch.device,
    report: ProgressReport = no_report,
) -> PlainExecution | StreamedExecution:
    """Choose the attention backend and the way of executing. AttentionUnavailable if the backend cannot serve."""
    if execution.fpdt and config.attention_dropout:
        raise ValueError(f"--attention-dropout ({config.attention_dropout}) cannot be replayed by FPDT; use 0")
    attention = choose_backend(config.attention_backend, device, dtype, config.kv_channels, execution.documents)
    offloading = execution.fpdt and execution.offloading
    store = ChunkStore(device, offloading, execution.device_memory_bytes, execution.host_memory_bytes)
    chunk_length = execution.chunk_size if execution.fpdt else config.seq_length
    stream = Stream(
        store,
        attention,
        parallel_state,
        chunk_length,
        report=report,
        checkpoint_interval=execution.checkpoint_interval,
        recompute=execution.fpdt_recompute,
    )
    if execution.fpdt:
        return StreamedExecution(stream)
    return PlainExecution(stream, execution.recompute, execution.checkpoint_in_cpu)


def build_model(
    config: ModelConfig,
    padded_vocab_size: int,
    parallel_state: ParallelState,
    execution: Execution,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 1234,
    report: ProgressReport = no_report,
) -> GPTModel:
    """Build the model with its initial values, the same on every rank.

    Parameters are made one module after the other, so that ZeRO-3's partitioning can take each as it comes.
    """
    device = torch.device(device)
    initializer = Initializer(
        generator=torch.Generator(device).manual_seed(seed),
        dtype=dtype,
        device=device,
        std=config.init_method_std,
        residual_std=config.init_method_std / (2 * config.num_layers) ** 0.5,
    )
    how = build_execution(config, parallel_state, execution, dtype, device, report)
    return GPTModel(config, padded_vocab_size, initializer, how)
