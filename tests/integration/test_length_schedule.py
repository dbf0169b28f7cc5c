"""A schedule of lengths: each phase reads on where the one before ended, and a resumed run is the straight one."""

import re
from pathlib import Path

import pytest

from tests.integration.runs import OFFLOADED, Run, base_flags, ranks, train
from tests.integration.test_resume import assert_same_checkpoint

# Chunks of 24: one, two and three of them.
SCHEDULE = ["--seq-length-schedule", "16:3,32:3,64", "--train-iters", "8", "--lr-warmup-tokens", "512", *OFFLOADED]


def lengths(run: Run) -> list[int]:
    return [int(length) for length in re.findall(r"sequence length: +(\d+)", run.output)]


def test_a_run_resumes_in_the_middle_of_a_phase(corpus: Path, tmp_path: Path) -> None:
    flags = [*base_flags(corpus), *SCHEDULE, "--deterministic-mode"]
    straight, resumed, half = tmp_path / "straight", tmp_path / "resumed", ["--exit-interval", "4"]
    whole = train([*flags, *ranks(2, 3), "--save", str(straight)], tmp_path / "whole", 2)
    first = train([*flags, *ranks(2, 3), "--save", str(resumed), *half], tmp_path / "first", 2)
    alone = train([*flags, "--load", str(resumed), "--universal-checkpoint"], tmp_path / "alone")
    second = train([*flags, *ranks(2, 3), "--save", str(resumed), "--load", str(resumed)], tmp_path / "second", 2)

    assert lengths(whole) == [16] * 3 + [32] * 3 + [64] * 2
    assert lengths(first) + lengths(second) == lengths(whole)
    assert first.losses | second.losses == whole.losses
    assert_same_checkpoint(straight / "global_step8", resumed / "global_step8", 2)
    assert alone.losses == pytest.approx(second.losses, rel=1e-5)
    assert re.findall(r"consumed tokens: +(\d+)", whole.output)[-1] == str(4 * (3 * 16 + 3 * 32 + 2 * 64))
    assert "from iteration 4: sequences of 32 tokens" in whole.output
