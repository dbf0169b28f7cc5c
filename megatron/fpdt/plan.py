"""The order of work of a streamed causal block, as plain data.

Row i is query chunk i; tile (i, j) is query chunk i against key/value chunk j, for j <= i.

    forward    rows ascending; in a row the diagonal first: its keys and values are already on the device, and it gives
               every query a finite log-sum-exp to merge into. Then j = 0 .. i-1.
    backward   rows descending; in a row the diagonal first, which is the last of its column: dk_i and dv_i are then
               final. Then j = 0 .. i-1.

Every backward tile but the first of its column adds to gradients of the tile above it. Between two rows those of the
next diagonal stay on the device, as the row's last tile is the one above it; so a row begins with a tile that loads
nothing. The others are stored, at least two tiles before they are loaded, so that loads may always run one tile ahead
of the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Query chunk `query` against key/value chunk `key`.

    `first_of_column` (backward): there is no gradient of `key` yet.
    """

    query: int
    key: int
    first_of_column: bool = False

    @property
    def is_diagonal(self) -> bool:
        return self.query == self.key


@dataclass(frozen=True)
class ChunkPlan:
    """Tiles of a causal sequence of `num_chunks` chunks."""

    num_chunks: int

    def forward_rows(self) -> list[list[Tile]]:
        """Rows in order of execution, each with its tiles in order of execution."""
        return [[Tile(i, i), *(Tile(i, j) for j in range(i))] for i in range(self.num_chunks)]

    def backward_rows(self) -> list[list[Tile]]:
        """Rows in order of execution, each with its tiles in order of execution."""
        last = self.num_chunks - 1
        return [[Tile(i, j, first_of_column=i == last) for j in (i, *range(i))] for i in range(last, -1, -1)]
