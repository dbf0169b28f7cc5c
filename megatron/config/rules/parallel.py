"""Rules between the number of ranks, the sequence-parallel size, the chunk size and the batch size."""

from __future__ import annotations

import math
from functools import partial

from megatron.config.parallel import AUTOMATIC_CHUNK
from megatron.config.rules.common import Rule, Run, divisors, flag, listed, nearest_multiples, shown, value_of

SIZE = "ds_sequence_parallel_size"
CHUNK = "ds_sequence_parallel_fpdt_chunk_size"


def only_one(name: str, kind: str, run: Run) -> str | None:
    if value_of(run.config, name) == 1:
        return None
    return (
        f"{shown(run.config, name)} must be 1, as there is no {kind} parallelism here; use {flag(name)} 1, and "
        f"{flag(SIZE)} and --zero-stage 3 to shard a model that is too large"
    )


def sequence_parallel_size_divides_world(run: Run) -> str | None:
    size = run.config.parallel.ds_sequence_parallel_size
    if run.world_size % size == 0:
        return None
    return (
        f"{shown(run.config, SIZE)} must divide the number of ranks ({run.world_size}); "
        f"start {listed(nearest_multiples(run.world_size, size))} ranks{_or_another_size(run)}"
    )


def sequence_parallel_size_divides_sequence(run: Run) -> str | None:
    size, length = run.config.parallel.ds_sequence_parallel_size, run.config.model.seq_length
    if length % size == 0:
        return None
    return (
        f"{shown(run.config, 'seq_length')} must be a multiple of {shown(run.config, SIZE)}, as each rank takes "
        f"equally many tokens of every chunk; use {listed(_possible_lengths(run))}{_or_another_size(run)}"
    )


def _possible_lengths(run: Run) -> list[int]:
    """Return sequence lengths near the given one that the ranks can share; longer ones only where positions allow."""
    model = run.config.model
    lengths = nearest_multiples(model.seq_length, run.config.parallel.ds_sequence_parallel_size)
    if "max_position_embeddings" not in run.config.given:
        return lengths
    return [length for length in lengths if length <= model.max_position_embeddings] or lengths


def sequence_parallel_size_divides_chunk(run: Run) -> str | None:
    parallel = run.config.parallel
    size, chunk = parallel.ds_sequence_parallel_size, parallel.ds_sequence_parallel_fpdt_chunk_size
    if not parallel.ds_sequence_parallel_fpdt or chunk % size == 0:
        return None
    return (
        f"{shown(run.config, CHUNK)} must be a multiple of {shown(run.config, SIZE)}; "
        f"use {listed(nearest_multiples(chunk, size))}{_or_another_size(run)}"
    )


def deterministic_chunk_is_given(run: Run) -> str | None:
    parallel = run.config.parallel
    is_given = parallel.ds_sequence_parallel_fpdt_chunk_size != AUTOMATIC_CHUNK
    if is_given or not (run.config.training.deterministic_mode and parallel.ds_sequence_parallel_fpdt):
        return None
    return (
        f"{flag(CHUNK)} auto follows the memory that is free at the start, and another chunk size gives other bits, "
        f"which --deterministic-mode rules out; use {flag(CHUNK)} N, for example the one that tools/plan_context.py "
        "proposes"
    )


def _or_another_size(run: Run) -> str:
    sizes = sequence_parallel_sizes(run)
    return f", or {flag(SIZE)} {listed(sizes)}" if sizes else ""


def sequence_parallel_sizes(run: Run) -> list[int]:
    """Return every sequence-parallel size that this run's tokens, ranks and batch allow."""
    config = run.config
    common = math.gcd(run.world_size, config.model.seq_length)
    if config.parallel.ds_sequence_parallel_fpdt:
        common = math.gcd(common, config.parallel.ds_sequence_parallel_fpdt_chunk_size)
    batch, micro_batch = config.training.global_batch_size, config.training.micro_batch_size
    return [size for size in divisors(common) if batch is None or batch % (micro_batch * run.world_size // size) == 0]


def global_batch_is_whole_micro_batches(run: Run) -> str | None:
    training, ranks = run.config.training, run.data_parallel_size
    per_pass = training.micro_batch_size * ranks
    if training.global_batch_size is None or training.global_batch_size % per_pass == 0:
        return None
    message = (
        f"{shown(run.config, 'global_batch_size')} must be a multiple of {shown(run.config, 'micro_batch_size')} x the "
        f"data-parallel size ({ranks}) = {per_pass}; use "
        f"{listed(nearest_multiples(training.global_batch_size, per_pass))}"
    )
    if training.global_batch_size % ranks == 0:
        message += f", or --micro-batch-size {listed(divisors(training.global_batch_size // ranks))}"
    return message


PARALLEL_RULES: tuple[Rule, ...] = (
    partial(only_one, "tensor_model_parallel_size", "tensor"),
    partial(only_one, "pipeline_model_parallel_size", "pipeline"),
    sequence_parallel_size_divides_world,
    sequence_parallel_size_divides_sequence,
    sequence_parallel_size_divides_chunk,
    deterministic_chunk_is_given,
    global_batch_is_whole_micro_batches,
)
