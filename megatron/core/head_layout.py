"""Head layout: the heads, and the rows of them, that each rank attends with after the all-to-all of a chunk.

The p ranks are u groups of r ranks. The groups share the H query heads; a group has the key/value heads that its query
heads read, of the whole chunk. The ranks of a group share the rows, which are the queries of the chunk:

    rank = share x u + group     heads: H/u, and one more in the first groups if u does not divide H
                                 rows: parts j and 2r-1-j of 2r equal parts of the chunk, one j for each share

r = 1 is Ulysses, u = 1 is context parallelism. Under a causal mask every such pair of parts is the same work. The j are
chosen so that half of a share's rows are tokens of its own u ranks, and stay on their machine if it has u GPUs.

Keys and values are repeated for the ranks: each head until all copies are read by equally many query heads of one group
only, and then all heads for each share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd

from torch import Tensor

from megatron.core.documents import Span


@dataclass(frozen=True)
class RowShare:
    """Share `share` of `num_shares` of the rows of every chunk."""

    share: int = 0
    num_shares: int = 1

    def spans(self, num_rows: int) -> list[Span]:
        """Return the share's spans of a chunk of so many rows, ascending: one or two."""
        num_parts = 2 * self.num_shares
        edges = [part * num_rows // num_parts for part in range(num_parts + 1)]
        first = min(2 * self.share, num_parts - 1 - 2 * self.share)
        second = num_parts - 1 - first
        if second == first + 1:
            return [(edges[first], edges[second + 1])]
        return [(edges[part], edges[part + 1]) for part in (first, second) if edges[part] < edges[part + 1]]

    def count(self, num_rows: int) -> int:
        """Return the share's rows of a chunk of so many rows, a multiple of the number of ranks."""
        return num_rows // self.num_shares


ALL_ROWS = RowShare()


@dataclass(frozen=True)
class HeadLayout:
    """The heads of an attention layer over the `num_ranks` ranks of a sequence."""

    num_heads: int
    num_key_value_heads: int
    num_ranks: int = 1

    @cached_property
    def num_groups(self) -> int:
        """Groups u that share the heads: p if p divides H.

        Of the numbers that cost at most an eighth of attention's time, as ranks with fewer heads wait, it is the one
        with the fewest key/value heads per rank, which stores and copies them for the whole chunk; then the one that
        costs least; then the largest.
        """
        H, p = self.num_heads, self.num_ranks
        largest = {u: -(-H // u) for u in range(1, min(H, p) + 1) if p % u == 0}  # heads of the largest group

        def cost(u: int) -> tuple[bool, int, int, int]:
            waiting = largest[u] * u - H
            num_keys = largest[u] // _queries_per_key(H, self.num_key_value_heads, u)
            return 8 * waiting > largest[u] * u, num_keys, waiting, -u

        return min(largest, key=cost)

    @property
    def num_row_shares(self) -> int:
        """Ranks r of a group."""
        return self.num_ranks // self.num_groups

    @cached_property
    def heads_of_groups(self) -> tuple[int, ...]:
        """Query heads of each group, the larger ones first."""
        return _shared_evenly(self.num_heads, self.num_groups)

    @cached_property
    def queries_per_key(self) -> int:
        """Query heads that read one copy of a key/value head."""
        return _queries_per_key(self.num_heads, self.num_key_value_heads, self.num_groups)

    @property
    def largest_num_heads(self) -> int:
        """Query heads of all groups if each had as many as the largest."""
        return self.heads_of_groups[0] * self.num_groups

    @property
    def largest_num_key_value_heads(self) -> int:
        """Copies of key/value heads on all ranks if each had as many as the largest."""
        return self.heads_of_groups[0] // self.queries_per_key * self.num_ranks

    def own_entries(self, of_heads_H: Tensor, rank: int) -> Tensor:
        """Return the entries [H/u] of a rank's query heads in a tensor of one entry per head."""
        return of_heads_H.split(self.heads_of_groups)[rank % self.num_groups]

    def rows(self, rank: int) -> RowShare:
        """Return the rows that a rank attends with."""
        return RowShare(rank // self.num_groups, self.num_row_shares)

    def divisible_by(self, num_shares: int) -> bool:
        """Whether the key/value heads of every rank can be divided into so many equal shares."""
        return all(num_heads % (self.queries_per_key * num_shares) == 0 for num_heads in self.heads_of_groups)

    def repeated_keys_and_values(self, kv_SBKD: Tensor) -> Tensor:
        """Repeat the heads of kv [S, B, 2K, D], keys first, for the ranks that read them.

        Differentiable: the gradients of the copies are summed.
        """
        copies = self.num_heads // self.queries_per_key // self.num_key_value_heads
        if copies > 1:
            kv_SBKD = kv_SBKD.repeat_interleave(copies, 2)
        if self.num_row_shares == 1:
            return kv_SBKD
        return kv_SBKD.unflatten(2, (2, -1)).repeat(1, 1, 1, self.num_row_shares, 1).flatten(2, 3)

    def __str__(self) -> str:
        """Say what each rank has, and what it costs that some have fewer heads."""
        most, fewest = self.heads_of_groups[0], self.heads_of_groups[-1]
        first = self.heads_of_groups.count(most) * self.num_row_shares
        each = f"{most} on each" if most == fewest else f"{most} on {first} ranks, {fewest} on {self.num_ranks - first}"
        rows = f", with 1/{self.num_row_shares} of each chunk's queries" if self.num_row_shares > 1 else ""
        lost = 1 - self.num_heads / self.largest_num_heads
        cost = f"; {lost:.1%} of attention's time is lost" if lost else ""
        return f"{self.num_heads} heads over {self.num_ranks} ranks: {each}{rows}{cost}"


def _shared_evenly(num_heads: int, num_groups: int) -> tuple[int, ...]:
    each, rest = divmod(num_heads, num_groups)
    return (each + 1,) * rest + (each,) * (num_groups - rest)


def _queries_per_key(num_heads: int, num_key_value_heads: int, num_groups: int) -> int:
    """Return the most query heads that can read each copy, so that no copy is read by two groups."""
    return gcd(num_heads // num_key_value_heads, *_shared_evenly(num_heads, num_groups))
