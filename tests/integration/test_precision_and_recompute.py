"""bf16 under every ZeRO stage, and activation checkpointing, which must not change a bit."""

import math
from pathlib import Path

import pytest

from tests.integration.golden_losses import SETTINGS, Golden
from tests.integration.runs import EXECUTIONS, OFFLOADED, PLAIN, base_flags, ranks, train

BF16_TOLERANCE = 0.02  # about 2^-8, the precision of a bf16 number, over a few steps
DROPOUT = ["--train-iters", "4", "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
RECOMPUTE = ["--deepspeed-activation-checkpointing"]


@pytest.mark.parametrize(
    "num_ranks, zero_stage, execution",
    [(1, 0, "plain"), (1, 1, "offloaded"), (1, 2, "fpdt"), (2, 3, "offloaded")],
)
def test_bf16_trains_and_stays_near_the_fp32_losses(
    corpus: Path, tmp_path: Path, num_ranks: int, zero_stage: int, execution: str
) -> None:
    flags = [*SETTINGS, "--bf16", *EXECUTIONS[execution], *ranks(num_ranks, zero_stage)]
    run = train([*base_flags(corpus), *flags], tmp_path / "events", num_ranks)
    golden = Golden.read("llama")
    assert list(run.losses.values()) == pytest.approx(golden.losses, rel=BF16_TOLERANCE)
    assert list(run.grad_norms.values()) == pytest.approx(golden.grad_norms, rel=5 * BF16_TOLERANCE)
    assert run.losses[20] < run.losses[1] - 0.5
    assert all(math.isfinite(norm) for norm in run.grad_norms.values())


def test_recomputation_replays_dropout_and_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    flags = [*base_flags(corpus), *DROPOUT]
    kept = train([*flags, *PLAIN], tmp_path / "kept")
    recomputed = train([*flags, *RECOMPUTE], tmp_path / "recomputed")
    on_host = train([*flags, *RECOMPUTE, "--checkpoint-in-cpu"], tmp_path / "on_host")
    assert recomputed.losses == kept.losses
    assert recomputed.grad_norms == kept.grad_norms
    assert on_host.losses == kept.losses
    assert on_host.grad_norms == kept.grad_norms


@pytest.mark.slow  # DeepSpeed's Adam for the host compiles for minutes
def test_the_optimizer_on_the_host_stays_near_the_golden_losses(corpus: Path, tmp_path: Path) -> None:
    flags = [*SETTINGS, "--cpu-optimizer", *OFFLOADED, *ranks(2, 3)]
    run = train([*base_flags(corpus), *flags], tmp_path / "events", 2)
    assert list(run.losses.values()) == pytest.approx(Golden.read("llama").losses, rel=1e-5)
