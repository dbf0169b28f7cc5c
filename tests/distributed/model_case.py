"""One configuration of the real model on real ranks, against the reference.

A case says what the model is, how it is executed, and on how many ranks. Every rank builds the model through the
package's builder, loads the same random weights, computes the loss of its own tokens and hands back its gradients; the
test process sums them and compares with the one-process float64 reference.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config import ModelConfig, Recompute
from megatron.core.documents import Documents, Span
from megatron.core.parallel_state import ParallelState
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.device_budget import ChunkKind, DeviceBudget
from megatron.fpdt.disk_budget import DiskBudget
from megatron.fpdt.observer import Observer
from megatron.fpdt.stream import SLICE_LENGTH
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from megatron.model.layers import SelfAttention
from tests.distributed.rank_pool import RankPool
from tests.reference.compare import assert_gradients_equal
from tests.reference.reference_model import Batch, Result, State, loss_and_gradients, random_state

PADDED_VOCAB_SIZE = 64
VOCAB_SIZE = 61
NUM_HEADS = 8
TOLERANCE = 1e-12

Setting = int | float | str | bool
LLAMA: dict[str, Setting] = {
    "use_rotary_position_embeddings": True,
    "normalization": "rmsnorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
GPT: dict[str, Setting] = {"normalization": "layernorm"}
FAMILIES = {"llama": LLAMA, "gpt": GPT}


@dataclass(frozen=True)
class Case:
    """What to run. `positions` is "learned", or the share of each head that rotates; chunk_length 0 means FPDT off.

    max_positions 0 means as many as the sequence is long. `switches` names what the model has beyond its family.
    `documents` are the spans of those in each sequence of a rank's batch; without, each sequence is one. `limits` are
    the (window, local block) of the layers in turn; with `sinks` each layer has them. With `on_disk`, the host holds
    some of the chunks and a disk this share of the others.
    """

    family: str = "llama"
    switches: tuple[str, ...] = ()
    positions: str | float = 1.0
    num_heads: int = NUM_HEADS
    num_key_value_heads: int = NUM_HEADS
    num_layers: int = 2
    sequence_length: int = 48
    batch_size: int = 1
    chunk_length: int = 0
    offloading: bool = False
    on_disk: float | None = None
    sequence_parallel_size: int = 1
    data_parallel_size: int = 1
    attention_backend: str = "auto"
    max_positions: int = 0
    activation_checkpointing: bool = False
    checkpoint_in_cpu: bool = False
    recompute: Recompute = Recompute.ALL
    checkpoint_interval: int = 1
    slice_length: int = SLICE_LENGTH
    documents: tuple[tuple[Span, ...], ...] = ()
    limits: tuple[tuple[int | None, int | None], ...] = ()
    sinks: bool = False

    @property
    def num_ranks(self) -> int:
        return self.sequence_parallel_size * self.data_parallel_size

    def __str__(self) -> str:
        execution = f"chunk{self.chunk_length}" if self.chunk_length else "plain"
        offloading = "-offload" if self.offloading else ""
        offloading += f"-disk{self.on_disk}" if self.on_disk is not None else ""
        positions = self.positions if self.positions == "learned" else f"rope{float(self.positions):.0%}"
        heads = f"kv{self.num_key_value_heads}of{self.num_heads}"
        ranks = f"dp{self.data_parallel_size}-sp{self.sequence_parallel_size}"
        recompute = "-recompute" if self.activation_checkpointing else ""
        recompute += "-in-cpu" if self.checkpoint_in_cpu else ""
        if self.recompute is not Recompute.ALL:
            recompute += f"-recompute-{self.recompute}-slices{self.slice_length}"
        family = "-".join((self.family, *self.switches))
        family += f"-{self.limits}{'-sinks' * self.sinks}" if self.limits or self.sinks else ""
        documents = "".join(f"-{'+'.join(f'{a}:{b}' for a, b in spans)}" for spans in self.documents)
        return (
            f"{family}-{positions}-{heads}-batch{self.batch_size}-{execution}{offloading}{recompute}-{ranks}{documents}"
        )


@dataclass(frozen=True)
class RankResult:
    """What one rank returns: its sum of masked token losses, its gradients and the global positions it owned."""

    loss_sum: float
    gradients: State
    positions: list[int]


def model_config(case: Case) -> ModelConfig:
    """Return the ModelConfig of a case; 16-wide heads, so that 25% of one is two pairs of rotary dimensions."""
    settings: dict[str, Setting] = FAMILIES[case.family] | dict.fromkeys(case.switches, True)
    if case.positions == "learned":
        settings["use_rotary_position_embeddings"] = False
    else:
        settings |= {"use_rotary_position_embeddings": True, "rotary_percent": float(case.positions)}
    return ModelConfig(
        num_layers=case.num_layers,
        hidden_size=32,
        ffn_hidden_size=40,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_key_value_heads,
        kv_channels=16,
        seq_length=case.sequence_length,
        max_position_embeddings=case.max_positions or case.sequence_length,
        attention_backend=case.attention_backend,
        **settings,
    )


class SinkAttention:
    """A layer's core attention, called with the sinks of its attention module."""

    def __init__(self, attention: SelfAttention) -> None:
        self._core, self._attention = attention.core_attention, attention

    def __call__(self, *args: Any) -> Tensor:
        # Cast, as a layer may have its sinks in another format.
        return self._core(*args, self._attention.sinks.double())


def limit_attention(case: Case, model: nn.Module) -> None:
    """Give the layers the windows, local blocks and sinks of a case, which a ModelConfig does not have."""
    for number, layer in enumerate(model.layers):
        attention = layer.self_attention
        if case.limits:
            window, local_block = case.limits[number % len(case.limits)]
            attention.variant = replace(attention.variant, window=window, local_block=local_block)
        if case.sinks:
            attention.sinks = nn.Parameter(sinks_of(case, number))
            attention.core_attention = SinkAttention(attention)


def sinks_of(case: Case, layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(case.num_heads, generator=generator, dtype=torch.float64)


def state_of(case: Case) -> State:
    """Return the random weights of a case's model."""
    state = random_state(model_config(case), PADDED_VOCAB_SIZE, seed=3)
    layers = range(case.num_layers if case.sinks else 0)
    return state | {f"layers.{number}.self_attention.sinks": sinks_of(case, number) for number in layers}


def build(case: Case, observer: Observer | None = None) -> tuple[nn.Module, ParallelState, SequenceLayout]:
    """Build a case's model on this rank, float64 on CPU; return it with the parallel state and the sequence layout."""
    parallel_state = ParallelState.create(case.sequence_parallel_size)
    chunk_length = case.chunk_length or case.sequence_length
    execution = Execution(
        fpdt=case.chunk_length > 0,
        chunk_size=chunk_length,
        offloading=case.offloading,
        **({} if case.on_disk is None else on_disk(case.on_disk)),
        activation_checkpointing=case.activation_checkpointing,
        checkpoint_in_cpu=case.checkpoint_in_cpu,
        recompute=case.recompute,
        checkpoint_interval=case.checkpoint_interval,
        slice_length=case.slice_length,
        observer=observer or Observer(),
    )
    model = build_model(
        model_config(case),
        PADDED_VOCAB_SIZE,
        parallel_state,
        execution,
        Initialization(torch.float64),
    )
    limit_attention(case, model)
    layout = SequenceLayout(case.sequence_length, chunk_length, case.sequence_parallel_size)
    return model, parallel_state, layout


def on_disk(share: float) -> dict[str, Any]:
    """Return memory for chunks on the device, on the host and on disk, where each is short of it."""
    reserved = {ChunkKind.KEY_VALUE_GRADIENTS: 8_000, ChunkKind.KEYS_VALUES: 8_000}
    folder = tempfile.gettempdir()
    return {
        "device_budget": DeviceBudget(10_000),
        "host_memory_bytes": 60_000,
        "disk": DiskBudget((folder, folder), 2**25, 0, share, reserved),
    }


def global_batch(case: Case) -> Batch:
    """Return the batch of all data-parallel ranks, [dp * B, S]; a third of the tokens and one run of them masked."""
    generator = torch.Generator().manual_seed(7)
    shape = (case.data_parallel_size * case.batch_size, case.sequence_length)
    tokens, labels = torch.randint(0, VOCAB_SIZE, (2, *shape), generator=generator)
    mask = (torch.rand(shape, generator=generator) < 0.7).double()
    mask[0, case.sequence_length // 3 : case.sequence_length // 2] = 0.0
    if case.documents:
        mask *= torch.stack([_inside(spans, case.sequence_length) for spans in case.documents]).repeat(
            case.data_parallel_size, 1
        )
    return Batch(tokens, labels, mask, visible_keys(case) if case.limits else ())


def visible_keys(case: Case) -> tuple[Tensor, ...]:
    """Return which keys a query sees in each layer, [dp * B, S, S]."""
    positions = torch.arange(case.sequence_length)
    query, key = positions[:, None], positions
    spans = case.documents or (((0, case.sequence_length),),) * case.batch_size
    numbers = torch.stack([_numbered(row, case.sequence_length) for row in spans])
    together = (numbers[:, :, None] == numbers[:, None]) & (numbers[:, :, None] >= 0)
    places = positions - (numbers[:, :, None] == numbers[:, None]).int().argmax(-1)  # in the token's document
    masks = []
    for number in range(case.num_layers):
        window, local_block = (each or case.sequence_length for each in case.limits[number % len(case.limits)])
        seen = (key <= query) & (query - key < window)
        blocks = places // local_block
        seen = together & seen & (blocks[:, :, None] == blocks[:, None])
        masks.append(seen.repeat(case.data_parallel_size * case.batch_size // len(spans), 1, 1))
    return tuple(masks)


def _numbered(spans: tuple[Span, ...], sequence_length: int) -> Tensor:
    """Return the document of each token, -1 for padding."""
    numbers = torch.full((sequence_length,), -1)
    for number, (start, end) in enumerate(spans):
        numbers[start:end] = number
    return numbers


def _inside(spans: tuple[Span, ...], sequence_length: int) -> Tensor:
    inside = torch.zeros(sequence_length)
    for start, end in spans:
        inside[start:end] = 1.0
    return inside


def local_inputs(case: Case, data_parallel_rank: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut a rank's (tokens, labels, loss_mask, position_ids), each [B, S/sp], out of the global batch."""
    batch = global_batch(case)
    rows = slice(data_parallel_rank * case.batch_size, (data_parallel_rank + 1) * case.batch_size)
    tokens, labels, mask = (x[rows][:, positions].contiguous() for x in (batch.tokens, batch.labels, batch.loss_mask))
    restarting = torch.arange(case.sequence_length).repeat(case.batch_size, 1)
    for row, spans in enumerate(case.documents):
        for start, end in spans:
            restarting[row, start:end] = torch.arange(end - start)
    return tokens, labels, mask, restarting[:, positions].contiguous()


def run_rank(case: Case) -> RankResult:
    """Run a case on this rank: build, load the random weights, forward, backward."""
    model, parallel_state, layout = build(case)
    model.load_state_dict(state_of(case), strict=True)
    positions = layout.owned_positions(parallel_state.sequence_parallel_rank)
    inputs = local_inputs(case, parallel_state.data_parallel_rank, positions)
    originals = [x.clone() for x in inputs]
    loss_sum = model(*inputs, Documents(case.documents) if case.documents else None)
    loss_sum.backward()
    assert all(torch.equal(x, original) for x, original in zip(inputs, originals, strict=True)), "input written to"
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"parameters without a gradient on rank {dist.get_rank()}: {without}"
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return RankResult(float(loss_sum), gradients, positions.tolist())


@lru_cache(maxsize=64)
def reference_result(case: Case) -> Result:
    config, batch = model_config(case), global_batch(case)
    state = state_of(case)
    if case.limits or not case.documents:
        return loss_and_gradients(config, state, batch)
    loss, gradients = torch.zeros((), dtype=torch.float64), {}
    for row, spans in enumerate(case.documents * (case.batch_size // len(case.documents))):
        for start, end in spans:
            alone = Batch(*(x[row : row + 1, start:end] for x in (batch.tokens, batch.labels, batch.loss_mask)))
            share = alone.loss_mask.sum() / batch.loss_mask.sum()
            if share:
                result = loss_and_gradients(config, state, alone)
                loss += share * result.loss
                gradients = {
                    name: gradients.get(name, 0.0) + share * gradient for name, gradient in result.gradients.items()
                }
    return Result(loss, gradients)


def reference(case: Case) -> Result:
    """Return the reference's result; cases that differ only in execution share it."""
    total_batch = case.batch_size * case.data_parallel_size
    return reference_result(
        replace(
            case,
            batch_size=total_batch,
            data_parallel_size=1,
            sequence_parallel_size=1,
            chunk_length=0,
            offloading=False,
            on_disk=None,
            activation_checkpointing=False,
            checkpoint_in_cpu=False,
            recompute=Recompute.ALL,
            checkpoint_interval=1,
            slice_length=SLICE_LENGTH,
            attention_backend="auto",
        )
    )


def assert_exact(pool: RankPool, case: Case, tolerance: float = TOLERANCE) -> None:
    """Fail unless the ranks' loss and every gradient, summed over ranks, are the reference's to float64 rounding."""
    results = pool.run(run_rank, case, num_ranks=case.num_ranks)
    assert_layout(case, results)
    want = reference(case)
    num_unmasked = float(global_batch(case).loss_mask.sum())
    loss = sum(result.loss_sum for result in results) / num_unmasked
    assert abs(loss - float(want.loss)) < tolerance * float(want.loss), f"loss {loss!r}, reference {float(want.loss)!r}"
    gradients = {
        name: torch.stack([result.gradients[name] for result in results]).sum(0) / num_unmasked
        for name in results[0].gradients
    }
    assert_gradients_equal(model_config(case), gradients, want.gradients, tolerance)


def assert_layout(case: Case, results: list[RankResult]) -> None:
    """Fail unless rank r owned the r-th of the equal slices of every chunk."""
    length, end, size = case.chunk_length or case.sequence_length, case.sequence_length, case.sequence_parallel_size
    chunks = [range(start, min(start + length, end)) for start in range(0, end, length)]
    for rank, result in enumerate(results):
        share = rank % size
        slices = [chunk[len(chunk) * share // size : len(chunk) * (share + 1) // size] for chunk in chunks]
        assert result.positions == [position for part in slices for position in part]
