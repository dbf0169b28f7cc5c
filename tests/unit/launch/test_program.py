"""How a run ends by an error of its own, and by one of another rank."""

import pytest
import torch.distributed as dist

from megatron.checkpointing import CheckpointError
from megatron.launch.program import comes_of_a_collective, end_by
from megatron.monitoring.finite_check import NotFiniteError
from megatron.ranks.watchdog import RankLost, Watchdog

GLOO = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")


class Listening(Watchdog):
    """Remembers whether it was asked for another rank's fault."""

    was_asked = False

    def wait_for_verdict(self) -> None:
        self.was_asked = True


def in_other_words(cause: Exception) -> Exception:
    try:
        raise CheckpointError("the checkpoint cannot be loaded") from cause
    except CheckpointError as error:
        return error


@pytest.mark.parametrize(
    "error, exit_code, line, is_of_another",
    [
        (CheckpointError("damaged"), 2, "error: damaged", False),
        (NotFiniteError("nan"), 5, "error: nan", False),
        (RankLost("rank(s) 0 of 2 did not join"), 4, "error on rank 0: rank(s) 0 of 2 did not join", False),
        (KeyError("x"), 1, "error on rank 0: it failed in joining, as above", False),
        (GLOO, 1, "error on rank 0: it failed in joining, as above", True),
        (dist.DistBackendError("NCCL error"), 1, "error on rank 0: it failed in joining, as above", True),
        (in_other_words(GLOO), 2, "error: the checkpoint cannot be loaded", True),
        (in_other_words(RuntimeError("not a zip archive")), 2, "error: the checkpoint cannot be loaded", False),
    ],
)
def test_an_error_has_its_exit_code_and_line(
    error: Exception, exit_code: int, line: str, is_of_another: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    watchdog = Listening()
    assert end_by(error, watchdog) == exit_code
    said = capsys.readouterr().err
    assert said.endswith(f"{line}\n")
    assert said.count("\n") == 1 or exit_code == 1
    assert watchdog.was_asked == is_of_another == comes_of_a_collective(error)
