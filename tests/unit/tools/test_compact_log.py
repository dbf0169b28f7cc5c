import io

from megatron.logging.compact_line import format_compact
from megatron.logging.log_line import format_iteration
from tests.unit.logging.reported_runs import RECORD
from tests.unit.tools.tool import run_tool


def test_iterations_become_compact_and_other_lines_are_left_alone(monkeypatch, capsys):
    others = ["saved runs/x/global_step2", " validation loss at iteration 2 | lm loss value: 3.0 | lm loss PPL: 20.1 |"]
    log = "\n".join([others[0], format_iteration(RECORD), others[1]])
    monkeypatch.setattr("sys.stdin", io.StringIO(log))
    assert run_tool("compact_log") == 0
    assert capsys.readouterr().out == "\n".join([others[0], format_compact(RECORD), others[1]])
