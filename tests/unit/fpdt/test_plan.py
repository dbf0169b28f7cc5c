from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron.core.documents import Documents, Mask
from megatron.core.head_layout import ALL_ROWS, RowShare
from megatron.fpdt.plan import ChunkPlan
from megatron.fpdt.store import ChunkStore

COUNTS = range(1, 13)


def lower_triangle(num_chunks):
    return {(i, j) for i in range(num_chunks) for j in range(i + 1)}


def tiles_of(rows):
    return Counter((tile.query, tile.key) for row in rows for tile in row)


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_every_tile_of_the_lower_triangle_is_run_once_in_both_directions(num_chunks):
    plan = ChunkPlan([4] * num_chunks)
    for rows in (plan.forward_rows(), plan.backward_rows()):
        assert tiles_of(rows) == Counter(lower_triangle(num_chunks))


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_each_row_is_one_query_chunk_and_rows_ascend_forward_and_descend_backward(num_chunks):
    plan = ChunkPlan([4] * num_chunks)
    for rows, order in ((plan.forward_rows(), range(num_chunks)), (plan.backward_rows(), range(num_chunks)[::-1])):
        assert [{tile.query for tile in row} for row in rows] == [{i} for i in order]


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_the_diagonal_is_first_in_a_row(num_chunks):
    plan = ChunkPlan([4] * num_chunks)
    for rows in (plan.forward_rows(), plan.backward_rows()):
        for row in rows:
            assert row[0].is_diagonal
            assert sum(tile.is_diagonal for tile in row) == 1


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_exactly_the_first_backward_tile_of_each_column_is_marked_so(num_chunks):
    seen = set()
    for row in ChunkPlan([4] * num_chunks).backward_rows():
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
    rows = ChunkPlan([4] * num_chunks).forward_rows()
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
    rows = ChunkPlan([4] * num_chunks).backward_rows()
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
def test_what_a_tile_loads_is_stored_at_least_two_tiles_before_so_loads_can_be_prefetched(num_chunks):
    last = {}
    tiles = [(tile, tile is row[-1]) for row in ChunkPlan([4] * num_chunks).backward_rows() for tile in row]
    for index, (tile, stays) in enumerate(tiles):
        if not tile.is_diagonal:
            assert index - last.get(tile.key, -2) >= 2
        if not stays:
            last[tile.key] = index


@pytest.mark.parametrize("num_chunks", COUNTS)
def test_the_last_tile_of_a_backward_row_is_above_the_diagonal_that_comes_next(num_chunks):
    rows = ChunkPlan([4] * num_chunks).backward_rows()
    assert [row[-1].key for row in rows[:-1]] == [row[0].key for row in rows[1:]]


LENGTHS = [8, 8, 8, 8, 5]
TOTAL = sum(LENGTHS)


def random_documents(random):
    """Two sequences of documents of all lengths, some with padding between them."""
    rows = []
    for _ in range(2):
        cuts = [0, *sorted(random.choice(range(1, TOTAL), random.integers(0, 9), replace=False)), TOTAL]
        spans = [(int(a), int(b)) for a, b in pairwise(cuts)]
        rows.append(tuple(span for span in spans if random.random() < 0.8))
    return Documents(tuple(rows))


@dataclass(frozen=True)
class Visible:
    """What tokens may see: documents, or none; a window, or none; local blocks, or none."""

    documents: Documents | None
    window: int | None
    local_block: int | None

    @classmethod
    def draw(cls, seed):
        random = np.random.default_rng(seed)
        documents = random_documents(random) if random.random() < 0.6 else None
        window = int(random.choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 25, 36, 37, 50])) if random.random() < 0.6 else None
        return cls(documents, window, int(random.integers(1, 41)) if random.random() < 0.3 else None)

    def plan(self, rows=ALL_ROWS, lengths=LENGTHS):
        return ChunkPlan(lengths, self.documents, rows, self.window, self.local_block)

    def mask(self, row):
        """[S, S]: whether a query of a sequence sees a key."""
        query, key = np.indices((TOTAL, TOTAL))
        mask = (key <= query) & (query - key < (self.window or TOTAL))
        number, place = np.full(TOTAL, 0 if self.documents is None else -1), np.arange(TOTAL)
        for n, (start, end) in enumerate(self.documents.spans[row] if self.documents else ()):
            number[start:end], place[start:end] = n, np.arange(end - start)
        if self.local_block:
            mask &= place[query] // self.local_block == place[key] // self.local_block
        return mask & (number[query] == number[key]) & (number[query] >= 0)

    def __str__(self):
        return f"{self.documents and self.documents.spans} {self.window} {self.local_block}"


VISIBLE = pytest.mark.parametrize("visible", [Visible.draw(seed) for seed in range(150)], ids=str)
MASKS = {
    Mask.FULL: lambda query, key, window: np.ones_like(query, dtype=bool),
    Mask.CAUSAL: lambda query, key, window: (key <= query) & (query - key < (window or TOTAL)),
    Mask.UPPER: lambda query, key, window: key >= query,
}


@VISIBLE
@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_regions_of_all_tiles_are_what_tokens_see_and_none_is_empty(visible, num_shares):
    starts = np.cumsum([0, *LENGTHS])
    seen = np.zeros((2, TOTAL, TOTAL), dtype=int)
    for share in (RowShare(share, num_shares) for share in range(num_shares)):
        for tile in (tile for row in visible.plan(share).forward_rows() for tile in row):
            own = [starts[tile.query] + n for span in share.spans(LENGTHS[tile.query]) for n in range(*span)]
            keys = range(starts[tile.key], starts[tile.key + 1])
            own, keys = own[slice(*tile.queries)], keys[slice(*tile.keys)]
            view = seen[:, own, keys[0] : keys[-1] + 1]
            assert tile.is_diagonal or tile.regions, "a tile without anything to compute"
            for region in tile.regions:
                rectangle = view.transpose(1, 2, 0)[region.in_queries[0], region.in_keys[0], region.in_queries[1]]
                assert rectangle.size
                num_queries, num_keys = rectangle.shape[:2]
                assert region.mask is Mask.FULL or num_queries == num_keys, "a mask of a rectangle that is no square"
                assert region.window is None or (region.mask is Mask.CAUSAL and region.window < num_queries)
                rectangle += MASKS[region.mask](*np.indices((num_queries, num_keys)), region.window)[..., None]
            assert tile.is_diagonal or (view.any((0, 1)).all() and view.any((0, 2)).all()), "it could be smaller"
            seen[:, own, keys[0] : keys[-1] + 1] = view
    for row in (0, 1):
        assert (seen[row] == visible.mask(row)).all()


@VISIBLE
@pytest.mark.parametrize("num_shares", [1, 2])
def test_regions_that_are_not_merged_share_no_query_and_no_key(visible, num_shares):
    for tile in (tile for row in visible.plan(RowShare(0, num_shares)).forward_rows() for tile in row):
        taken = set()
        for region in (region for region in tile.regions if not region.merged):
            own = {
                (what, sequence, position)
                for what, span in (("query", region.queries), ("key", region.keys))
                for sequence in range(2)[slice(*region.sequences)]
                for position in range(TOTAL)[slice(*span)]
            }
            assert not own & taken
            taken |= own


@VISIBLE
@pytest.mark.parametrize("num_shares", [1, 2])
def test_tiles_are_those_in_which_a_query_sees_a_key(visible, num_shares):
    """All of them, none else; the columns are of consecutive rows; what is loaded was stored two tiles before."""
    starts, share = np.cumsum([0, *LENGTHS]), RowShare(1 % num_shares, num_shares)
    mask, plan = visible.mask(0) | visible.mask(1), visible.plan(share)
    rows, begun, stored = plan.backward_rows(), set(), {}
    for i, j in lower_triangle(len(LENGTHS)):
        own = [starts[i] + n for span in share.spans(LENGTHS[i]) for n in range(*span)]
        is_seen = mask[own, starts[j] : starts[j + 1]].any()
        assert ((i, j) in tiles_of(rows)) == (is_seen or i == j)
    for number, tile in enumerate(tile for row in rows for tile in row):
        assert tile.first_of_column == (tile.key not in begun)
        assert tile.is_diagonal or number - stored.get(tile.key, -2) >= 2
        begun.add(tile.key)
        stored[tile.key] = number
    for below, above in pairwise(rows):
        if len(below) > 1:
            assert below[-1].key == above[0].key
        else:
            assert all(tile.first_of_column for tile in above)
    off_diagonal = {tile.key for row in rows for tile in row if not tile.is_diagonal}
    assert {chunk for chunk in range(len(LENGTHS)) if plan.is_loaded(chunk)} == off_diagonal
    every_rank = [visible.plan(RowShare(rank, num_shares)) for rank in range(num_shares)]
    assert set(plan.loaded_keys()) == {j for each in every_rank for j in range(len(LENGTHS)) if each.is_loaded(j)}


@VISIBLE
def test_a_forward_tile_says_whether_the_keys_of_the_next_are_stored(visible):
    tiles = [tile for row in visible.plan().forward_rows() for tile in row]
    for place, tile in enumerate(tiles):
        following = next((other for other in tiles[place + 1 :] if not other.is_diagonal), None)
        assert tile.next_is_stored == (following is None or following.key <= tile.query)


def test_one_document_is_what_no_documents_are():
    whole = Documents.from_starts([[0], [0]], sum(LENGTHS))
    assert ChunkPlan(LENGTHS, whole).forward_rows() == ChunkPlan(LENGTHS).forward_rows()
    assert ChunkPlan(LENGTHS, whole).backward_rows() == ChunkPlan(LENGTHS).backward_rows()


def test_documents_of_a_chunk_each_leave_the_diagonal_alone():
    documents = Documents.from_starts([[0, 8, 16, 24, 32]], sum(LENGTHS))
    assert [len(row) for row in ChunkPlan(LENGTHS, documents).forward_rows()] == [1] * len(LENGTHS)
    assert documents.squared_lengths == 4 * 64 + 25


def test_a_tile_below_the_diagonal_attends_without_a_mask():
    for row in ChunkPlan(LENGTHS).forward_rows():
        for tile in row:
            assert [region.mask for region in tile.regions] == [Mask.CAUSAL if tile.is_diagonal else Mask.FULL]


def test_a_window_that_reaches_back_to_the_first_token_is_no_window():
    assert ChunkPlan(LENGTHS, window=TOTAL).forward_rows() == ChunkPlan(LENGTHS).forward_rows()
    assert ChunkPlan(LENGTHS, local_block=TOTAL).forward_rows() == ChunkPlan(LENGTHS).forward_rows()


@pytest.mark.parametrize(
    "window, num_tiles, num_regions",
    [(1, 5, 5), (2, 9, 9), (6, 9, 9), (8, 9, 10), (9, 9, 10), (10, 12, 20), (16, 12, 13), (17, 12, 13), (36, 15, 17)],
)
def test_a_window_leaves_few_tiles_of_few_regions(window, num_tiles, num_regions):
    tiles = [tile for row in ChunkPlan(LENGTHS, window=window).forward_rows() for tile in row]
    assert (len(tiles), sum(len(tile.regions) for tile in tiles)) == (num_tiles, num_regions)
