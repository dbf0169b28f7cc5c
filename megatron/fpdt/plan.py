"""The schedule of a streamed causal block, as plain data.

Row i is query chunk i; tile (i, j) is query chunk i against key/value chunk j, for j <= i.

    forward    rows ascending. In a row the diagonal runs first: its keys and values are already on the device, and it
               gives every query a finite log-sum-exp to merge into. Then j = 0 .. i-1.
    backward   rows descending. In a row the diagonal runs first. It is the last tile of its column, so dk_i and dv_i
               are then final. Then j = 0 .. i-1.

Every backward tile except the first of its column adds to the gradients of the previous tile of the column. The last
tile of a row is in the column of the next diagonal, so its gradients stay on the device for the next row: a row begins
with a tile that loads nothing. All other gradients are stored at least two tiles before they are loaded, so loads can
always be prefetched one tile ahead of compute.

Documents, local blocks and a sliding window limit what a token sees. Row i begins with the chunk of the first key that
its first query sees, and a tile is reduced to the regions that are seen (megatron.core.documents). The keys that a
query sees are consecutive and end with its own, and they begin no earlier than those of the query before. So the tiles
of a row are consecutive up to the diagonal, those of a column from the diagonal on, and all of the above holds. After a
row of the diagonal alone the next diagonal is the first tile of its column, and there is no gradient to add to.

If ranks share the rows of a chunk, a row of tiles has this rank's queries only, and all keys. Their first queries
differ, so one rank may have tiles that another has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from megatron.core.documents import EVERYTHING, Documents, Region, Span, in_local_blocks, tile_regions, trimmed
from megatron.core.head_layout import ALL_ROWS, RowShare


@dataclass(frozen=True)
class Tile:
    """Query chunk `query` against key/value chunk `key`, of which the `regions` are computed.

    Below the diagonal a tile is trimmed to the `queries` and `keys` that its regions span. `first_of_column`: in the
    backward pass there is no gradient of `key` yet. `next_is_stored`: in the forward pass the keys of the next tile
    off the diagonal, which may be in another row, are already on the tier.
    """

    query: int
    key: int
    regions: tuple[Region, ...]
    first_of_column: bool = False
    next_is_stored: bool = True
    queries: Span = EVERYTHING
    keys: Span = EVERYTHING

    @property
    def is_diagonal(self) -> bool:
        return self.query == self.key

    @property
    def is_trimmed(self) -> bool:
        return not self.queries == self.keys == EVERYTHING


class ChunkPlan:
    """Tiles of a causal sequence in chunks of these lengths, with this rank's `rows` of each.

    Each of the `documents`, cut into blocks of `local_block` tokens, attends to itself only, and a token to no more
    than the last `window` up to itself.
    """

    def __init__(
        self,
        chunk_lengths: Sequence[int],
        documents: Documents | None = None,
        rows: RowShare = ALL_ROWS,
        window: int | None = None,
        local_block: int | None = None,
    ) -> None:
        self._chunks = list(pairwise(accumulate(chunk_lengths, initial=0)))
        self._documents = in_local_blocks(documents, local_block, sum(chunk_lengths))
        self._query_rows, self._window = [self._rows_of(rows, chunk) for chunk in self._chunks], window
        self._first_keys = [self._key_chunk(spans[0][0]) for spans in self._query_rows]
        self._rows = [self._row(i) for i in range(len(self._chunks))]
        self._loaded_keys = {tile.key for row in self._rows for tile in row if not tile.is_diagonal}
        self._keys_of_all_ranks = sorted(
            {j for i, (start, _) in enumerate(self._chunks) for j in range(self._key_chunk(start), i)}
        )

    def forward_rows(self) -> list[list[Tile]]:
        """Return the rows in order of execution, each with its tiles in order of execution."""
        return self._rows

    def backward_rows(self) -> list[list[Tile]]:
        """Return the rows in order of execution, each with its tiles in order of execution."""
        return self._rows[::-1]

    def loaded_keys(self) -> list[int]:
        """Return the chunks, ascending, whose keys and values a tile off the diagonal loads, on any rank."""
        return self._keys_of_all_ranks

    def is_loaded(self, chunk: int) -> bool:
        """Whether a tile of this rank loads the keys and values of a chunk; that of its own row has them already."""
        return chunk in self._loaded_keys

    def _row(self, i: int) -> list[Tile]:
        first_keys, others = self._first_keys, range(self._first_keys[i], i)
        first_below = first_keys[i + 1] if i + 1 < len(first_keys) else i + 1
        first_after = next((first_keys[row] for row in range(i + 1, len(first_keys)) if first_keys[row] < row), i)
        last = i - 1 if others else i
        tiles = []
        for j in (i, *others):
            queries, keys, regions = EVERYTHING, EVERYTHING, self._regions(i, j)
            if i != j:
                queries, keys, regions = trimmed(regions)
            is_stored = j != last or first_after <= i
            tiles.append(Tile(i, j, regions, j < first_below, is_stored, queries, keys))
        return tiles

    def _rows_of(self, rows: RowShare, chunk: Span) -> list[Span]:
        """Return this rank's spans of rows of a chunk."""
        start, end = chunk
        return [(start + first, start + last) for first, last in rows.spans(end - start)]

    def _key_chunk(self, query: int) -> int:
        """Return the chunk of the first key that a query sees."""
        first = 0 if self._documents is None else self._documents.first_key(query)
        if self._window is not None:
            first = max(first, query - self._window + 1)
        return next(j for j, (_, end) in enumerate(self._chunks) if first < end)

    def _regions(self, i: int, j: int) -> tuple[Region, ...]:
        return tile_regions(self._documents, self._query_rows[i], self._chunks[j], self._window)


# As many plans are in use at a time as there are kinds of layers, in training and in evaluation.
@lru_cache(maxsize=8)
def chunk_plan(
    chunk_lengths: tuple[int, ...],
    documents: Documents | None = None,
    rows: RowShare = ALL_ROWS,
    window: int | None = None,
    local_block: int | None = None,
) -> ChunkPlan:
    """Return the plan, shared by all blocks that run on the same documents and attend alike."""
    return ChunkPlan(chunk_lengths, documents, rows, window, local_block)
