from collections import Counter

import pytest
import torch

from megatron.fpdt.plan import ChunkPlan
from megatron.fpdt.store import ChunkStore

COUNTS = range(1, 13)


def lower_triangle(num_chunks):
    return {(i, j) for i in range(num_chunks) for j in range(i + 1)}


def tiles_of(rows):
    return Counter((tile.query, tile.key) for row in rows for tile in row)


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_every_tile_of_the_lower_triangle_is_run_once_in_both_directions(num_chunks):
    plan = ChunkPlan(num_chunks)
    for rows in (plan.forward_rows(), plan.backward_rows()):
        assert tiles_of(rows) == Counter(lower_triangle(num_chunks))


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_each_row_is_one_query_chunk_and_rows_ascend_forward_and_descend_backward(num_chunks):
    plan = ChunkPlan(num_chunks)
    for rows, order in ((plan.forward_rows(), range(num_chunks)), (plan.backward_rows(), range(num_chunks)[::-1])):
        assert [{tile.query for tile in row} for row in rows] == [{i} for i in order]


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_the_diagonal_is_first_in_a_row(num_chunks):
    plan = ChunkPlan(num_chunks)
    for rows in (plan.forward_rows(), plan.backward_rows()):
        for row in rows:
            assert row[0].is_diagonal
            assert sum(tile.is_diagonal for tile in row) == 1


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_exactly_the_first_backward_tile_of_each_column_is_marked_so(num_chunks):
    seen = set()
    for row in ChunkPlan(num_chunks).backward_rows():
        for tile in row:
            assert tile.first_of_column == (tile.key not in seen)
            seen.add(tile.key)
    assert seen == set(range(num_chunks))


def host_chunks(store, num_chunks):
    chunks = [store.empty((1,), torch.float64) for _ in range(num_chunks)]
    for chunk in chunks:
        chunk.fill_(torch.nan)
    return chunks


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_forward_prefetch_loads_no_key_before_it_is_stored(num_chunks):
    store = ChunkStore(torch.device("cpu"), offloading=True)
    kv = host_chunks(store, num_chunks)
    rows = ChunkPlan(num_chunks).forward_rows()
    ahead = store.prefetch([kv[tile.key]] for row in rows for tile in row if not tile.is_diagonal)
    for row in rows:
        store.put(kv[row[0].query], torch.tensor([float(row[0].query)], dtype=torch.float64))
        for tile in row:
            if not tile.is_diagonal:
                assert next(ahead)[0].item() == tile.key
    assert next(ahead, None) is None


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_backward_prefetch_loads_the_gradient_that_the_tile_before_in_the_column_has_stored(num_chunks):
    """The stored value counts the tiles that have been added; a load that runs too early would see fewer, or NaN."""
    store = ChunkStore(torch.device("cpu"), offloading=True)
    dkv = host_chunks(store, num_chunks)
    rows = ChunkPlan(num_chunks).backward_rows()
    others = (tile for row in rows for tile in row if not tile.is_diagonal)
    ahead = store.prefetch([dkv[tile.key]] * (not tile.first_of_column) for tile in others)
    added, stays = Counter(), {}
    for row in rows:
        for tile in row:
            loaded = [stays.pop(tile.key, 0.0)] if tile.is_diagonal else [total.item() for total in next(ahead)]
            assert sum(loaded) == added[tile.key]
            added[tile.key] += 1
            if tile.is_diagonal:
                assert added[tile.key] == num_chunks - tile.key, "the diagonal's gradient is not final"
            elif tile is row[-1]:
                stays[tile.key] = float(added[tile.key])
            else:
                store.put(dkv[tile.key], torch.tensor([float(added[tile.key])], dtype=torch.float64))
    assert next(ahead, None) is None
    assert not stays


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_what_a_tile_loads_was_stored_at_least_two_tiles_before_so_that_loads_may_run_one_ahead(num_chunks):
    last = {}
    tiles = [(tile, tile is row[-1]) for row in ChunkPlan(num_chunks).backward_rows() for tile in row]
    for index, (tile, stays) in enumerate(tiles):
        if not tile.is_diagonal:
            assert index - last.get(tile.key, -2) >= 2
        if not stays:
            last[tile.key] = index


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_the_last_tile_of_a_backward_row_is_above_the_diagonal_that_comes_next(num_chunks):
    rows = ChunkPlan(num_chunks).backward_rows()
    assert [row[-1].key for row in rows[:-1]] == [row[0].key for row in rows[1:]]
