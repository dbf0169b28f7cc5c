"""Ranks that share a sequence compute shares of transformers' loss and gradients, in fp64."""

from typing import Any

import pytest
import torch

from megatron.hf import stream_model
from megatron.hf.float64 import float64_stays
from tests.distributed.rank_pool import RankPool
from tests.unit.hf.tiny_models import build, eager_loss, inputs, results, worst_error

LENGTH, CHUNK = 44, 12
SPANS = ((0, 7), (7, 30), (30, 44))


def share(family: str, num_ranks: int, packed: bool) -> dict[str, torch.Tensor]:
    """Return this rank's loss and gradients, of all parts of the sequences."""
    with float64_stays():
        model = stream_model(build(family).eval(), chunk_size=CHUNK, sequence_parallel_size=num_ranks)
        tokens, labels, mask, _ = inputs(LENGTH)
        return results(model, model(tokens, labels, mask, restarting_positions() if packed else None))


def restarting_positions() -> torch.Tensor:
    return torch.cat([torch.arange(end - start) for start, end in SPANS]).expand(2, LENGTH)


def whole(family: str, packed: bool) -> dict[str, torch.Tensor]:
    """Return transformers' loss and gradients."""
    model: Any = build(family).eval()
    batch = inputs(LENGTH)
    parts = [[t[:, slice(*span)] for t in batch] for span in (SPANS if packed else ((0, LENGTH),))]
    with float64_stays():
        losses = [eager_loss(model, *part[:3], torch.arange(part[0].shape[1]).expand(2, -1)) for part in parts]
        return results(model, torch.stack(losses).sum() / batch[2].sum())


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("family, packed", [("gpt_oss", True), ("gemma3_text", False), ("deepseek_v3", False)])
def test_the_shares_of_all_ranks_are_the_whole(ranks: RankPool, family: str, packed: bool, num_ranks: int) -> None:
    shares = ranks.run(share, family, num_ranks, packed, num_ranks=num_ranks)
    total = {name: torch.stack([each[name] for each in shares]).sum(0) for name in shares[0]}
    error, where = worst_error(total, whole(family, packed))
    assert error < 1e-12, where
