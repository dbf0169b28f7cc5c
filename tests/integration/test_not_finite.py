"""A step whose loss or gradient is not finite ends the run, which names the place and keeps its checkpoints."""

import re
from pathlib import Path

import pytest

from megatron.launch.program import NOT_FINITE_EXIT_CODE
from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import OFFLOADED, PLAIN, Ranks, base_flags, ranks, train

POISONED = REPOSITORY / "tests/integration/poisoned.py"
IN_A_CHUNK, IN_ONE = "chunk 2: positions 48-64", "chunk 0: positions 0-64"  # where token 50 is
FIRST = "the first value that is not finite is"
QUERIES = "the queries of layer 2 (forward, micro-batch"
GRADIENT = "the gradient of the input of layer 2 (backward, micro-batch"
WEIGHTS = "the weights of layer 2 (layers.1.post_attention_layernorm.weight)"


@pytest.mark.parametrize(
    "execution, layout, poison, said",
    [
        # Of two ranks of a sequence the second has tokens 32-63 of the one chunk, and 56-63 of the last of three.
        (OFFLOADED, ranks(2, 3), "0 queries", f"rank 0: {FIRST} {QUERIES} 0, {IN_A_CHUNK})"),
        (PLAIN, ranks(2, 0), "1 queries", f"rank 1: {FIRST} {QUERIES} 0, {IN_ONE})"),
        (OFFLOADED, ranks(1, 2), "1 gradient", f"rank 1: {FIRST} {GRADIENT} 0, {IN_A_CHUNK})"),
        (PLAIN, ranks(1, 1), "1 gradient", f"rank 1: {FIRST} {GRADIENT} 0, {IN_ONE})"),
        (OFFLOADED, ranks(2, 1), "0 weights", f"rank 0: {WEIGHTS} are not finite already."),
        (PLAIN, ranks(2, 3), "1 weights", f"rank 1: {WEIGHTS} are not finite already."),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.split(":")[0],
)
def test_rank_layer_pass_and_chunk_are_named_and_the_last_checkpoint_stands(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    execution: list[str],
    layout: list[str],
    poison: str,
    said: str,
) -> None:
    monkeypatch.setenv("POISON", f"3 {poison}")
    saving = ["--train-iters", "9", "--save", str(tmp_path), "--save-interval", "1"]
    with Ranks([*base_flags(corpus), *execution, *layout, *saving], num_ranks=2, script=POISONED) as run:
        ended = run.wait()
    assert [rank.exit_code for rank in ended] == [NOT_FINITE_EXIT_CODE] * 2, ended
    (error,) = re.findall("^error: .*$", ended[0].stderr, re.MULTILINE)
    assert error.startswith(f"error: iteration 3 (samples 8 to 11): the loss or gradient is not finite; {said}")
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert not (tmp_path / "global_step3").exists()


def test_weights_that_are_not_finite_are_not_saved_even_unchecked(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POISON", "3 0 queries")
    unchecked = ["--no-check-for-nan-in-loss-and-grad", "--train-iters", "4"]
    saving = ["--save", str(tmp_path), "--save-interval", "2"]
    with Ranks([*base_flags(corpus), *OFFLOADED, *unchecked, *saving], script=POISONED) as run:
        (ended,) = run.wait()
    assert ended.exit_code == NOT_FINITE_EXIT_CODE
    assert "the loss of iteration 3 is nan" in ended.stdout
    assert re.search(
        r"^error: iteration 4 is not saved: rank 0: the weights of .* and \d+ more are not finite; earlier checkpoints",
        ended.stderr,
        re.MULTILINE,
    )
    assert (tmp_path / "latest").read_text() == "global_step2"


def test_looking_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    flags = [*base_flags(corpus), *OFFLOADED, "--train-iters", "3"]
    looked = train(flags, tmp_path / "looked")
    unchecked = train([*flags, "--no-check-for-nan-in-loss-and-grad"], tmp_path / "unchecked")
    assert (looked.losses, looked.grad_norms) == (unchecked.losses, unchecked.grad_norms)
