"""Where the first value is that is not finite: over ranks, passes, micro-batches and chunks."""

import pytest
import torch
from torch import nn

from megatron.core.sequence_layout import SequenceLayout
from megatron.monitoring.finite_check import (
    BLOCK,
    Finding,
    FiniteCheck,
    Place,
    StepRecord,
    first_fault,
    weights_not_finite,
)

CHUNK, LENGTH = 24, 64
FINE, BAD = torch.ones(3), torch.tensor([1.0, torch.inf])
WEIGHT = "layers.2.mlp.weight"
LAST = Place("forward", "output", 17, 2, 1)
OF_WEIGHTS = Finding((True, 3), Place("backward", "weights of head.weight", None, None, 0))
SAYS = "the output of layer 17 (forward, micro-batch 1, chunk 2: positions 48-64); all weights are finite"


def place(order: int, where: Place = LAST) -> Finding:
    return Finding((False, order), where)


@pytest.mark.parametrize(
    "findings, said",
    [
        ([place(9), place(7), Finding()], f"rank 1: the first value that is not finite is {SAYS}"),
        ([Finding(), place(7), place(7)], f"rank 1 and 1 more, 2: the first value that is not finite is {SAYS}"),
        ([place(0), Finding(weights=[WEIGHT, "b"])], f"rank 1: the weights of layer 3 ({WEIGHT}) and 1 more are not"),
        ([Finding(weights=["head.weight"])], "rank 0: the weights of head.weight are not finite already"),
        (
            [Finding(), OF_WEIGHTS, place(7)],
            "rank 2",
        ),
    ],
)
def test_what_came_first_over_all_ranks_is_named(findings: list[Finding], said: str) -> None:
    assert (first_fault(findings, CHUNK, LENGTH) or "").startswith(said)


def test_where_all_is_finite_nothing_is_said() -> None:
    assert first_fault([Finding(), Finding()], CHUNK, LENGTH) is None
    assert weights_not_finite([Finding(), Finding()]) is None


def check_of(record: StepRecord, model: nn.Module) -> FiniteCheck:
    return FiniteCheck(record, model, lambda: [])


def say(notes: list[tuple[int, torch.Tensor]], loss: float, weight: float = 1.0, num_notes: int = 0) -> str | None:
    """Return what a check says of (micro-batch, value) noted in this order, a loss, and a gradient."""
    model = nn.Linear(1, 1, bias=False)
    record = StepRecord(torch.device("cpu"))
    check = check_of(record, model)
    for step in range(2):  # the second clears the records
        check.start_microbatch(0)
        for _ in range(num_notes):
            record.note("forward", "input", 1, 0, FINE)
        for microbatch, value in notes:
            check.start_microbatch(microbatch) if microbatch else None
            record.note("forward", "output", 3, 1, value if step else BAD)
        (model(torch.ones(1)) * weight).sum().backward()
        said = check.finish(torch.tensor(loss), SequenceLayout(LENGTH, CHUNK))
        record.note("forward", "output", 4, 0, BAD)  # of an evaluation
    return said


def in_a_process_group(_: None) -> list[str | None]:
    return [
        say([(0, FINE), (1, FINE)], 1.0),
        say([(0, BAD), (1, FINE)], 1.0),
        say([(0, FINE), (1, BAD)], torch.nan),
        say([(0, FINE), (1, BAD)], torch.nan, num_notes=2 * BLOCK),
        say([(0, FINE)], 1.0, weight=torch.nan),
        say([(0, FINE)], torch.inf),
    ]


def test_a_step_is_judged_by_its_loss_and_gradients_and_explained_by_what_came_first(ranks) -> None:
    (said,) = ranks.run(in_a_process_group, None, num_ranks=1)
    first = "rank 0: the first value that is not finite is the"
    assert said[0] is None
    assert said[1] is None  # padding, say: nothing came of it
    assert said[2] == said[3]
    assert (said[2] or "").startswith(f"{first} output of layer 3 (forward, micro-batch 1, chunk 1: positions 24-48)")
    assert (said[4] or "").startswith(f"{first} gradient of the weights of weight (backward, micro-batch 0)")
    assert (said[5] or "").startswith(f"{first} sum of the losses (forward, micro-batch 0)")
