"""Loss and every gradient of the real model on gloo ranks equal the one-process float64 reference, to float64 rounding.

Continuous integration runs a subset in which every value of every axis, and the pairs that interact, appear.
The whole grid:

    pytest -m grid tests/distributed/test_exactness.py
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from megatron.config import Recompute
from tests.distributed.model_case import Case, assert_exact
from tests.distributed.rank_pool import RankPool

# 48 tokens as 1, 2, 3 chunks and as 20 + 20 + 8.
CHUNKS = {"one chunk": 48, "two chunks": 24, "three chunks": 16, "uneven last": 20}
KEY_VALUE_HEADS = {"multi-head": 8, "grouped": 4, "fewer than 4 ranks": 2, "multi-query": 1}
MODELS = [("gpt", "learned"), ("gpt", 1.0), ("gpt", 0.25), ("llama", 1.0), ("llama", 0.25)]

LLAMA = Case(family="llama", positions=1.0, num_key_value_heads=4)
GPT = Case(family="gpt", positions="learned")

PLAIN = [
    replace(LLAMA),
    replace(GPT, batch_size=3),
    replace(LLAMA, sequence_parallel_size=2, batch_size=3, num_key_value_heads=1),
    replace(GPT, sequence_parallel_size=2),
    replace(LLAMA, sequence_parallel_size=4, num_key_value_heads=2, batch_size=3, positions=0.25),
    replace(GPT, sequence_parallel_size=4, positions=0.25),
    replace(LLAMA, sequence_parallel_size=2, activation_checkpointing=True),
    replace(GPT, sequence_parallel_size=2, activation_checkpointing=True, checkpoint_in_cpu=True),
]

STREAMED = [
    replace(LLAMA, chunk_length=48),
    replace(GPT, chunk_length=24, batch_size=3, offloading=True),
    replace(LLAMA, chunk_length=16, batch_size=3, positions=0.25, num_key_value_heads=1),
    replace(GPT, chunk_length=20, positions=1.0, num_key_value_heads=2, offloading=True),
    replace(LLAMA, chunk_length=20, sequence_parallel_size=2, num_key_value_heads=1, batch_size=3, offloading=True),
    replace(GPT, chunk_length=16, sequence_parallel_size=2, batch_size=3, positions=0.25),
    replace(GPT, chunk_length=48, sequence_parallel_size=2, offloading=True, num_key_value_heads=2),
    replace(LLAMA, chunk_length=20, sequence_parallel_size=4, batch_size=3, offloading=True),
    replace(LLAMA, chunk_length=16, sequence_parallel_size=4, num_key_value_heads=2, batch_size=3, positions=0.25),
    replace(LLAMA, chunk_length=24, sequence_parallel_size=4, num_key_value_heads=1, offloading=True),
    replace(GPT, chunk_length=20, sequence_parallel_size=4, batch_size=3, offloading=True),
    replace(GPT, chunk_length=24, sequence_parallel_size=4, num_key_value_heads=2),
]

ARCHITECTURES = {
    "biases in the projection to q, k and v alone": replace(LLAMA, switches=("add_qkv_bias",)),
    "GELU by tanh": replace(GPT, switches=("openai_gelu",)),
    "attention and MLP side by side": replace(GPT, switches=("parallel_residual",), positions=0.25),
    "all of it together": replace(
        LLAMA, switches=("add_qkv_bias", "qk_layernorm", "parallel_residual"), num_key_value_heads=2
    ),
    "RMSNorm of queries and keys": replace(LLAMA, switches=("qk_layernorm",), positions=0.25),
    # Without rotary positions attention is blind to a bias of the keys, which then has no gradient to compare.
    "LayerNorm of queries and keys": replace(GPT, switches=("qk_layernorm",), positions=1.0, num_key_value_heads=2),
}
EXECUTIONS = [
    {"num_key_value_heads": 8},
    {"sequence_parallel_size": 2, "batch_size": 3, "recompute": True},
    *({"chunk_length": 20, "sequence_parallel_size": size, "recompute": recompute, "slice_length": 3,
       "offloading": size == 2, "batch_size": 3 - size, "checkpoint_interval": 1 + (recompute is Recompute.ATTENTION)}
      for size in (1, 2) for recompute in Recompute),
]  # fmt: skip

CORNERS = {
    "chunks of one token per rank": replace(LLAMA, sequence_length=24, chunk_length=4, sequence_parallel_size=4),
    "last chunk of one token per rank": replace(LLAMA, sequence_length=36, chunk_length=16, sequence_parallel_size=4),
    "a chunk longer than the sequence": replace(GPT, chunk_length=64, sequence_parallel_size=2, offloading=True),
    "many chunks": replace(LLAMA, sequence_length=96, chunk_length=8, num_layers=3, offloading=True, batch_size=2),
    "prime number of tokens": replace(GPT, sequence_length=47, chunk_length=13, offloading=True),
    "ranks share key/value heads unevenly": replace(
        LLAMA, num_heads=12, num_key_value_heads=3, chunk_length=16, sequence_parallel_size=2, offloading=True
    ),
    "ranks straddle key/value groups": replace(
        LLAMA, num_heads=12, num_key_value_heads=3, chunk_length=16, sequence_parallel_size=4, batch_size=3
    ),
    "no product is recomputed": replace(
        LLAMA, chunk_length=20, sequence_parallel_size=2, offloading=True, recompute=Recompute.NONE, slice_length=3
    ),
    "the products of the MLP are recomputed": replace(
        GPT, chunk_length=20, sequence_parallel_size=4, batch_size=3, recompute=Recompute.MLP, slice_length=2
    ),
    "keys and values are made anew": replace(
        LLAMA,
        chunk_length=20,
        sequence_parallel_size=4,
        num_key_value_heads=2,
        recompute=Recompute.KV,
        slice_length=3,
        offloading=True,
    ),
    "attention is recomputed for chains of four blocks": replace(
        LLAMA,
        chunk_length=20,
        sequence_parallel_size=4,
        num_layers=6,
        checkpoint_interval=4,
        num_key_value_heads=2,
        recompute=Recompute.ATTENTION,
        slice_length=3,
        offloading=True,
    ),
    # The heads of a rank are exchanged in two shares.
    "one chunk of several slices": replace(
        LLAMA, chunk_length=48, sequence_parallel_size=2, batch_size=3, slice_length=5, offloading=True
    ),
    "one chunk of several slices, multi-head": replace(
        GPT, chunk_length=48, sequence_parallel_size=4, slice_length=5, recompute=Recompute.NONE
    ),
    "one chunk of several slices, with recomputed keys and values": replace(
        LLAMA, chunk_length=48, sequence_parallel_size=2, slice_length=24, recompute=Recompute.KV
    ),
    "one chunk of several slices, with recomputed attention": replace(
        GPT,
        chunk_length=48,
        sequence_parallel_size=2,
        num_layers=3,
        checkpoint_interval=3,
        slice_length=5,
        recompute=Recompute.ATTENTION,
    ),
    "the reference attention kernel": replace(
        LLAMA, chunk_length=20, sequence_parallel_size=2, attention_backend="reference", offloading=True
    ),
}

# Of 48 tokens in chunks of 16, or of 20, 20 and 8. Each is what the sequences of a batch hold.
DOCUMENTS = {
    "one": [(0, 48)],
    "at the edges of chunks": [(0, 16), (16, 32), (32, 48)],
    "before and after the edges": [(0, 15), (15, 33), (33, 48)],
    "one across three chunks between short ones": [(0, 7), (7, 41), (41, 48)],
    "two that end in a chunk where another begins": [(0, 18), (18, 19), (19, 48)],
    "many within chunks": [(0, 3), (3, 4), (4, 9), (9, 16), (16, 21), (21, 40), (40, 44), (44, 48)],
    "of one token": [*((i, i + 1) for i in range(37)), (37, 48)],
    "padding behind": [(0, 10), (10, 25)],
    "padding between": [(0, 14), (17, 19), (20, 30), (41, 47)],
    "padding before": [(22, 48)],
}
DOCUMENT_EXECUTIONS = [
    replace(LLAMA, num_key_value_heads=2),
    replace(GPT, sequence_parallel_size=2, activation_checkpointing=True),
    replace(LLAMA, chunk_length=16, num_key_value_heads=2, offloading=True),
    replace(GPT, chunk_length=20, recompute=Recompute.NONE, slice_length=3, offloading=True),
    replace(LLAMA, chunk_length=20, sequence_parallel_size=2, num_key_value_heads=1, offloading=True),
    replace(
        LLAMA,
        chunk_length=16,
        sequence_parallel_size=4,
        num_key_value_heads=2,
        positions=0.25,
        recompute=Recompute.ATTENTION,
        checkpoint_interval=2,
    ),
    replace(LLAMA, chunk_length=16, sequence_parallel_size=2, recompute=Recompute.KV, slice_length=3, offloading=True),
    replace(LLAMA, chunk_length=48, sequence_parallel_size=2, slice_length=7, offloading=True),
]
SEQUENCES_OF_DOCUMENTS = [
    ("one", "of one token", "padding behind"),
    ("at the edges of chunks", "one across three chunks between short ones", "padding between"),
    ("before and after the edges", "padding before", "many within chunks"),
]

DATA_PARALLEL = [
    replace(LLAMA, data_parallel_size=2, sequence_parallel_size=2),
    replace(LLAMA, data_parallel_size=2, sequence_parallel_size=2, chunk_length=20, batch_size=3, offloading=True),
    replace(GPT, data_parallel_size=4, chunk_length=16),
]


def with_documents(execution: Case, names: tuple[str, ...]) -> Case:
    """Return the case with a sequence of each of these documents."""
    return replace(execution, documents=tuple(tuple(DOCUMENTS[name]) for name in names), batch_size=len(names))


# What a rank has: 4 or 3 of 28 heads on 8; 7 of 28 over 4 key/value heads, 1 of 4, and 2 or 1 of 7 on 8, with half
# of the rows; 4 or 3 of 14 over 7 on 4; 4 of 8 over 4 on 6, and all 5 over 1 on 3, with a third of the rows.
UNEVEN = replace(LLAMA, sequence_parallel_size=8, num_heads=28, num_key_value_heads=28, batch_size=2)
SHARED = replace(UNEVEN, num_key_value_heads=4)
FEW = replace(GPT, sequence_parallel_size=8, num_heads=4, num_key_value_heads=4)
ANY_NUMBER_OF_RANKS = {
    "uneven, plain": UNEVEN,
    "uneven": replace(UNEVEN, chunk_length=32, offloading=True, recompute=Recompute.NONE, slice_length=3),
    "uneven, with documents": with_documents(replace(UNEVEN, chunk_length=16), SEQUENCES_OF_DOCUMENTS[0]),
    "uneven and grouped": replace(
        LLAMA, sequence_parallel_size=4, num_heads=14, num_key_value_heads=7, chunk_length=20, recompute=Recompute.KV
    ),
    "shared rows, plain": replace(SHARED, activation_checkpointing=True),
    "shared rows": replace(SHARED, chunk_length=32, offloading=True, recompute=Recompute.KV, slice_length=3),
    "shared rows, with documents": with_documents(replace(SHARED, chunk_length=24), SEQUENCES_OF_DOCUMENTS[1]),
    "more ranks than heads, plain": with_documents(FEW, SEQUENCES_OF_DOCUMENTS[2]),
    "more ranks than heads": replace(
        FEW, chunk_length=8, num_layers=3, checkpoint_interval=2, recompute=Recompute.KV, offloading=True
    ),
    "more ranks than heads, with documents": with_documents(
        replace(FEW, num_key_value_heads=1, chunk_length=32, offloading=True), SEQUENCES_OF_DOCUMENTS[0]
    ),
    "uneven with shared rows": replace(
        LLAMA, sequence_parallel_size=8, num_heads=7, num_key_value_heads=7, chunk_length=16, batch_size=3
    ),
    "shared rows of one chunk, whose heads travel in two shares": replace(
        LLAMA, sequence_parallel_size=6, num_key_value_heads=4, chunk_length=48, batch_size=2, slice_length=3
    ),
    "all heads": with_documents(
        replace(LLAMA, sequence_parallel_size=3, num_heads=5, num_key_value_heads=1, chunk_length=21),
        SEQUENCES_OF_DOCUMENTS[1],
    ),
}

# On the GPU, on the host and on disk.
ON_THREE_TIERS = {
    "one rank": replace(GPT, chunk_length=20, num_layers=3, offloading=True, on_disk=0.5, batch_size=2),
    "recomputed keys and values": replace(
        LLAMA, chunk_length=12, sequence_parallel_size=2, offloading=True, recompute=Recompute.KV, on_disk=0.7
    ),
    "saved products, and rebuilt inputs": replace(
        LLAMA, chunk_length=16, sequence_parallel_size=2, num_layers=5, checkpoint_interval=2, slice_length=3,
        offloading=True, recompute=Recompute.NONE, on_disk=1.0,
    ),
    "four ranks, recomputed attention": replace(
        LLAMA, chunk_length=16, sequence_parallel_size=4, num_key_value_heads=2, num_layers=5, checkpoint_interval=3,
        offloading=True, recompute=Recompute.ATTENTION, on_disk=0.4,
    ),
    "windows and documents": with_documents(
        replace(LLAMA, chunk_length=12, offloading=True, limits=((7, None), (None, None)), sinks=True, on_disk=0.5),
        SEQUENCES_OF_DOCUMENTS[1],
    ),
}  # fmt: skip

# (window, local block) of the first layer and of the second.
LIMITS = {
    "a window of one token, and none": ((1, None), (None, None)),
    "windows shorter than a chunk": ((7, None), (2, None)),
    "windows of a chunk": ((16, None), (20, None)),
    "windows of one token more than a chunk": ((17, None), (21, None)),
    "windows longer than a chunk": ((23, None), (37, None)),
    "windows of the sequence and longer": ((48, None), (100, None)),
    "local blocks": ((None, 16), (None, 13)),
    "a window in local blocks, and blocks longer than a chunk": ((6, 11), (None, 33)),
}
LIMITED_EXECUTIONS = {
    "plain": replace(LLAMA, num_key_value_heads=2),
    "plain, recomputed": replace(LLAMA, sequence_parallel_size=2, activation_checkpointing=True),
    "three chunks": replace(LLAMA, chunk_length=16, num_key_value_heads=2, offloading=True),
    "slices": replace(LLAMA, chunk_length=20, recompute=Recompute.NONE, slice_length=3, offloading=True),
    "slices of two ranks": replace(
        LLAMA, chunk_length=20, sequence_parallel_size=2, recompute=Recompute.MLP, slice_length=3
    ),
    "recomputed inputs, keys and values": replace(
        LLAMA,
        chunk_length=12,
        sequence_parallel_size=2,
        num_layers=3,
        checkpoint_interval=2,
        recompute=Recompute.KV,
        slice_length=3,
        offloading=True,
    ),
    "recomputed attention": replace(
        LLAMA,
        chunk_length=16,
        sequence_parallel_size=4,
        num_layers=3,
        checkpoint_interval=3,
        num_key_value_heads=2,
        recompute=Recompute.ATTENTION,
    ),
    "one chunk whose heads travel in two shares": replace(
        LLAMA, chunk_length=48, sequence_parallel_size=2, slice_length=7
    ),
    "uneven heads": replace(LLAMA, sequence_parallel_size=4, num_heads=14, num_key_value_heads=7, chunk_length=20),
    "shared rows, plain": replace(LLAMA, sequence_parallel_size=4, num_heads=2, num_key_value_heads=2),
    "shared rows": replace(
        LLAMA, sequence_parallel_size=4, num_heads=2, num_key_value_heads=1, chunk_length=16, recompute=Recompute.KV
    ),
    "shared rows of large chunks": replace(
        LLAMA,
        sequence_parallel_size=6,
        num_heads=2,
        num_key_value_heads=2,
        chunk_length=24,
        offloading=True,
        recompute=Recompute.ATTENTION,
    ),
}

GRID = [
    Case(
        family=family,
        positions=positions,
        num_key_value_heads=key_value_heads,
        batch_size=batch_size,
        chunk_length=chunk_length,
        offloading=offloading,
        sequence_parallel_size=sequence_parallel_size,
    )
    for (family, positions), key_value_heads, batch_size, (chunk_length, offloading), sequence_parallel_size in product(
        MODELS,
        KEY_VALUE_HEADS.values(),
        (1, 3),
        [(0, False), *product(CHUNKS.values(), (False, True))],
        (1, 2, 4),
    )
]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_plain_execution_is_exact(ranks: RankPool, case: Case) -> None:
    assert_exact(ranks, case)


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_fpdt_is_exact(ranks: RankPool, case: Case) -> None:
    assert_exact(ranks, case)


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_exact(ranks: RankPool, name: str, execution: dict[str, Any]) -> None:
    assert_exact(ranks, replace(ARCHITECTURES[name], **execution))


@pytest.mark.parametrize("execution", DOCUMENT_EXECUTIONS, ids=str)
@pytest.mark.parametrize("names", [*((name,) for name in DOCUMENTS), *SEQUENCES_OF_DOCUMENTS], ids=" and ".join)
def test_documents_see_themselves_alone(ranks: RankPool, execution: Case, names: tuple[str, ...]) -> None:
    assert_exact(ranks, with_documents(execution, names))


@pytest.mark.parametrize("documents", [(), SEQUENCES_OF_DOCUMENTS[1]], ids=["one document", "documents"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("execution", LIMITED_EXECUTIONS)
def test_windows_local_blocks_and_sinks_are_exact(
    ranks: RankPool, execution: str, limits: str, documents: tuple[str, ...]
) -> None:
    case = replace(LIMITED_EXECUTIONS[execution], limits=LIMITS[limits], sinks=True, batch_size=2)
    assert_exact(ranks, with_documents(case, documents) if documents else case)


@pytest.mark.parametrize("name", CORNERS)
def test_fpdt_is_exact_at_corners(ranks: RankPool, name: str) -> None:
    assert_exact(ranks, CORNERS[name])


@pytest.mark.parametrize("name", ANY_NUMBER_OF_RANKS)
def test_any_number_of_ranks_is_exact(ranks: RankPool, name: str) -> None:
    assert_exact(ranks, ANY_NUMBER_OF_RANKS[name])


@pytest.mark.parametrize("name", ON_THREE_TIERS)
def test_chunks_on_gpu_host_and_disk_are_exact(ranks: RankPool, name: str) -> None:
    assert_exact(ranks, ON_THREE_TIERS[name])


@pytest.mark.parametrize("case", DATA_PARALLEL, ids=str)
def test_data_parallel_with_sequence_parallel_is_exact(ranks: RankPool, case: Case) -> None:
    assert_exact(ranks, case)


@pytest.mark.grid
@pytest.mark.parametrize("case", GRID, ids=str)
def test_every_combination_is_exact(ranks: RankPool, case: Case) -> None:
    assert_exact(ranks, case)
