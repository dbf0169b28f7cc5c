"""Construction of a model from a configuration: the only place that chooses streamed or plain execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron.config import ModelConfig, Recompute
from megatron.core.head_layout import HeadLayout
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.device_budget import NO_DEVICE_MEMORY, DeviceBudget
from megatron.fpdt.disk_budget import DiskBudget
from megatron.fpdt.observer import Observer
from megatron.fpdt.store import ChunkStore
from megatron.fpdt.stream import SLICE_LENGTH, Saving, Stream, WholeParameters, already_whole
from megatron.model.initialization import Initialization
from megatron.model.layers import attention_request, has_short_tiles, head_layout
from megatron.model.plain import PlainExecution
from megatron.model.streamed import StreamedExecution
from megatron.model.transformer import GPTModel
from megatron.ops.attention import AttentionBackend, choose_backend


@dataclass(frozen=True)
class Execution:
    """How a model is executed; its parameters and results do not depend on it.

    `device_budget`, `host_memory_bytes` and `disk` are what FPDT's chunks may use with offloading: the device first,
    then the host, then the disk. `recompute` is that of FPDT's blocks; `activation_checkpointing` and
    `checkpoint_in_cpu` apply without FPDT. `documents` means that batches may hold documents that do not attend to each
    other. `by_length` says the same of sequences of other lengths, of what is saved and of `device_budget`.
    `slice_length` counts the tokens of a rank that token-wise work runs on together.
    `observer` and `whole_parameters` are what the run gives the stream.
    """

    fpdt: bool = False
    chunk_size: int = 65536
    offloading: bool = False
    device_budget: DeviceBudget = NO_DEVICE_MEMORY
    host_memory_bytes: int | None = None
    disk: DiskBudget | None = None
    checkpoint_interval: int = 1
    recompute: Recompute = Recompute.ALL
    activation_checkpointing: bool = False
    checkpoint_in_cpu: bool = False
    documents: bool = False
    slice_length: int = SLICE_LENGTH
    by_length: Mapping[int, Saving] = field(default_factory=dict)
    observer: Observer = field(default_factory=Observer, compare=False)
    whole_parameters: WholeParameters = already_whole


def build_execution(
    config: ModelConfig,
    parallel_state: ParallelState,
    execution: Execution,
    dtype: torch.dtype,
    device: torch.device,
) -> PlainExecution | StreamedExecution:
    """Choose the attention backend and the execution. AttentionUnavailable if none can serve."""
    if execution.fpdt and config.attention_dropout:
        raise ValueError(f"--attention-dropout ({config.attention_dropout}) cannot be replayed by FPDT; use 0")
    heads = head_layout(config, parallel_state.sequence_parallel_size)
    request = attention_request(config, device, dtype)
    attention = choose_backend(
        config.attention_backend, request, has_short_tiles(config, heads.num_ranks, execution.documents)
    )
    return execution_on(execution, parallel_state, heads, attention, device, config.seq_length)


def execution_on(
    execution: Execution,
    parallel_state: ParallelState,
    heads: HeadLayout,
    attention: AttentionBackend,
    device: torch.device,
    seq_length: int,
) -> PlainExecution | StreamedExecution:
    """Choose the execution of layers with these `heads`, which attend by `attention`."""
    offloading = execution.fpdt and execution.offloading
    store = ChunkStore(device, offloading, execution.device_budget, execution.host_memory_bytes, execution.disk)
    chunk_length = execution.chunk_size if execution.fpdt else seq_length
    stream = Stream(
        store,
        attention,
        parallel_state,
        heads,
        chunk_length,
        execution.slice_length,
        execution.checkpoint_interval,
        execution.recompute,
        execution.observer,
        execution.whole_parameters,
        execution.by_length,
    )
    if execution.fpdt:
        return StreamedExecution(stream)
    return PlainExecution(stream, execution.activation_checkpointing, execution.checkpoint_in_cpu)


def build_model(
    config: ModelConfig,
    padded_vocab_size: int,
    parallel_state: ParallelState,
    execution: Execution,
    initialization: Initialization,
) -> GPTModel:
    """Build the model with its initial values, the same on every rank.

    Parameters are created one module after the other, so that ZeRO-3 can partition each as it is created.
    """
    if config.hf_model is not None:
        raise ValueError(f"--hf-model ({config.hf_model}) is not built from flags")
    how = build_execution(config, parallel_state, execution, initialization.dtype, initialization.device)
    model = GPTModel(config, padded_vocab_size, initialization.initializer(config), how)
    for layer in model.layers:
        how.attach(layer)  # type: ignore[arg-type]
    return model
