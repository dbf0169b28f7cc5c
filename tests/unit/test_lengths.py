"""How many samples a training may come to read."""

import pytest

from megatron.lengths import Lengths
from tests.unit.config.commands import parsed

RUN = "--train-iters 10 --global-batch-size 4 --eval-iters 2 --eval-interval 5"
ROLLBACKS = "--rollback-on-loss-spike 3 --save x --save-interval 2 --loss-spike-factor 2"


@pytest.mark.parametrize(
    "flags, left_out, training", [("", 0, 40), ("", 8, 48), (ROLLBACKS, 0, 64), (ROLLBACKS, 8, 72)]
)
def test_data_are_there_for_what_was_left_out_and_for_every_rollback(flags: str, left_out: int, training: int) -> None:
    config = parsed(f"{RUN} {flags}")
    assert Lengths.of(config, 1).num_samples(config, left_out) == (training, 3 * 8, 8)
