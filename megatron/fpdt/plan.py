"""The order of work of a streamed causal block, as plain data.

Row i is query chunk i; tile (i, j) is query chunk i against key/value chunk j, for j <= i.

    forward    rows ascending; in a row the diagonal first: its keys and values are already on the device, and it gives
               every query a finite log-sum-exp to merge into. Then j = 0 .. i-1.
    backward   rows descending; in a row j = 0 .. i-1, and the diagonal last, when every query chunk has been seen and
               dk_i, dv_i are final.

Every backward tile but the first of its column adds to gradients that an earlier tile has stored. Because a diagonal
lies between two tiles of a column, what a tile loads was stored at least two tiles before, so that loads may always run
one tile ahead of the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Query chunk `query` against key/value chunk `key`.

    `first_of_column` (backward): no gradient of `key` is stored yet.
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
        return [[Tile(i, j, first_of_column=i == last) for j in range(i + 1)] for i in range(last, -1, -1)]
