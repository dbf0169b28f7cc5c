"""Every feature of an architecture trains the same alone and spread, with ZeRO-3 and FPDT, whose numbers must agree."""

from pathlib import Path

import pytest

from tests.integration.runs import EXECUTIONS, LLAMA, base_flags, ranks, train

SETTINGS = ["--train-iters", "6", "--weight-decay", "0.1", "--clip-grad", "0.72"]
ARCHITECTURES = {
    "norms of queries and keys, and YaRN": [
        *[*LLAMA, "--add-qkv-bias", "--qk-layernorm", "--rope-scaling-type", "yarn", "--rope-scaling-factor", "4"],
        *["--rope-scaling-original-max-position-embeddings", "16"],
    ],
    "attention and MLP side by side, and dynamic scaling": [
        *["--parallel-residual", "--use-rotary-position-embeddings", "--rotary-percent", "0.5"],
        *["--rope-scaling-type", "dynamic", "--rope-scaling-factor", "4"],
        *["--rope-scaling-original-max-position-embeddings", "16"],
    ],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_trains_the_same_alone_and_spread(corpus: Path, tmp_path: Path, name: str) -> None:
    flags = [*base_flags(corpus, ARCHITECTURES[name]), *SETTINGS]
    alone = train(flags, tmp_path / "alone")
    spread = train([*flags, *EXECUTIONS["kept"], *ranks(sequence_parallel=2, zero_stage=3)], tmp_path / "spread", 2)
    assert list(alone.losses) == [1, 2, 3, 4, 5, 6]
    assert spread.losses == pytest.approx(alone.losses, rel=5e-6)
    assert spread.grad_norms == pytest.approx(alone.grad_norms, rel=5e-5)
