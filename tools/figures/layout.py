"""Figure of the sequence layout: the tokens and heads of each rank before and after the all-to-all."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from figures.style import INK, RANK_COLORS, bare, box, new_figure
from megatron.core.sequence_layout import SequenceLayout

LAYOUT = SequenceLayout(sequence_length=28, chunk_length=8, sequence_parallel_size=4)
NUM_HEADS = 8
EXCHANGED = 1  # the chunk whose all-to-all is shown


def content() -> dict[str, Any]:
    """Return each rank's tokens in local order, and its heads after the all-to-all of a chunk."""
    p = LAYOUT.sequence_parallel_size
    return {
        "chunk_lengths": LAYOUT.chunk_lengths,
        "local_lengths": LAYOUT.local_lengths,
        "tokens_of_rank": [LAYOUT.owned_positions(rank).tolist() for rank in range(p)],
        "heads_of_rank": [list(range(r * NUM_HEADS // p, (r + 1) * NUM_HEADS // p)) for r in range(p)],
        "exchanged": EXCHANGED,
    }


def draw(content: dict[str, Any]) -> Any:
    """Draw the sequence, the ranks' shards, and an all-to-all, one below the other."""
    figure, axes = new_figure(12, 8.2, rows=3, gridspec_kw={"height_ratios": [2.5, 4.4, 9]})
    _draw_sequence(axes[0], content)
    _draw_shards(axes[1], content)
    _draw_exchange(axes[2], content)
    return figure


def _draw_sequence(axes: Any, content: dict[str, Any]) -> None:
    lengths = content["chunk_lengths"]
    title = f"the sequence: {sum(lengths)} tokens in chunks of {lengths[0]}, by the rank that owns them"
    bare(axes, sum(lengths), 2.3, title)
    for rank, tokens in enumerate(content["tokens_of_rank"]):
        for token in tokens:
            box(axes, (token, 0.3), (1, 1), RANK_COLORS[rank], str(token))
    for number, (end, length) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
        axes.plot([end - length + 0.1, end - 0.1], [1.5, 1.5], color=INK, linewidth=2, clip_on=False)
        axes.text(end - length / 2, 1.95, f"chunk {number}", ha="center", va="center")


def _draw_shards(axes: Any, content: dict[str, Any]) -> None:
    tokens_of_rank, local = content["tokens_of_rank"], content["local_lengths"]
    width = sum(content["chunk_lengths"])
    bare(axes, width, 4.4, "the shard of each rank: its slice of every chunk, in the order of the chunks")
    for rank, tokens in enumerate(tokens_of_rank):
        axes.text(0, rank + 0.5, f"rank {rank}", va="center")
        for place, token in enumerate(tokens):
            box(axes, (3 + place, rank), (1, 1), RANK_COLORS[rank], str(token))
    for end in list(accumulate(local))[:-1]:
        axes.plot([3 + end] * 2, [-0.1, len(tokens_of_rank) + 0.1], color=INK, linewidth=2)
    note = "Token-wise work: every rank on its own tokens,\nwith all heads. Lines separate the chunks."
    axes.text(4.5 + len(tokens_of_rank[0]), 2, note, va="center")


def _draw_exchange(axes: Any, content: dict[str, Any]) -> None:
    chunk, lengths = content["exchanged"], content["chunk_lengths"]
    first, length, total = sum(lengths[:chunk]), lengths[chunk], sum(lengths)
    bare(axes, total, 9.6, f"the all-to-all of chunk {chunk}: which rank has which head of which token")
    num_heads = sum(map(len, content["heads_of_rank"]))
    before, after, top, height = 2, total - length, 2, 0.9  # where the two grids begin, and the height of a head
    for left, name in ((before, "before: own tokens, all heads"), (after, "after: all tokens, own heads")):
        axes.text(left, 0.7, name, va="center")
        for column in range(length):
            axes.text(left + column + 0.5, 1.6, str(first + column), ha="center", va="center", fontsize=11)
        for head in range(num_heads):
            axes.text(left - 0.2, top + (head + 0.5) * height, f"head {head}", ha="right", va="center", fontsize=11)
    for rank, (tokens, heads) in enumerate(zip(content["tokens_of_rank"], content["heads_of_rank"], strict=True)):
        own = [token for token in tokens if first <= token < first + length]
        color = RANK_COLORS[rank]
        box(axes, (before + own[0] - first, top), (len(own), height * num_heads), color, f"rank\n{rank}")
        box(axes, (after, top + height * heads[0]), (length, height * len(heads)), color, f"rank {rank}")
    left, right = before + length, after - 2
    for y, text, start, end in (
        (4.4, "tokens to heads: q, k, v", left + 0.5, right - 0.5),
        (6.6, "heads to tokens: o", right - 0.5, left + 0.5),
    ):
        arrow = {"arrowstyle": "-|>", "linewidth": 2, "color": INK}
        axes.annotate("", (end, y), (start, y), arrowprops=arrow)
        axes.text((left + right) / 2, y - 0.5, text, ha="center", va="center")
