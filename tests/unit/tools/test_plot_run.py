from tests.unit.logging.reported_runs import RECORD, record, write_events, write_log
from tests.unit.tools.tool import load_tool, run_tool

PNG = b"\x89PNG"


class Axes:
    """Collects the curves that are drawn."""

    def __init__(self):
        self.curves = {}

    def plot(self, x, y, *_, label, **__):
        self.curves[label] = (list(x), list(y))

    def __getattr__(self, name):
        return lambda *_, **__: None


def test_runs_of_both_kinds_become_one_picture(tmp_path):
    write_events(tmp_path / "after" / "tensorboard", [record(i, loss=4 / i) for i in range(1, 9)])
    write_log(tmp_path / "before.log", [record(i, loss=8 / i, mfu=None) for i in range(1, 9)])
    picture = tmp_path / "plots" / "run.png"
    assert run_tool("plot_run", tmp_path / "before.log", tmp_path / "after", "--output", picture) == 0
    assert picture.read_bytes().startswith(PNG)


def test_losses_are_drawn_over_tokens_and_iterations_without_one_are_marked(tmp_path):
    tool = load_tool("plot_run")
    log = tmp_path / "a.log"
    write_log(log, [record(1), record(2, loss=None, skipped_iterations=1), record(3, skipped_iterations=1, loss=6.0)])
    axes = Axes()
    tool._draw_losses(axes, [tool.read_run(log)])
    assert axes.curves == {
        "a": ([1000, 3000], [RECORD.loss, 6.0]),
        "a, validation": ([1000, 2000, 3000], [3.0] * 3),
        "a, skipped": ([2000], [0.03]),
    }


def test_memory_is_drawn_over_hours(tmp_path):
    tool = load_tool("plot_run")
    log = tmp_path / "a.log"
    write_log(log, [record(1), record(4)])
    axes = Axes()
    tool._draw_panel(axes, tool.PANELS[-1], [tool.read_run(log)])
    assert axes.curves == {"a, host pool": ([1.0, 4.0], [5.0, 5.0]), "a, process": ([1.0, 4.0], [9.0, 9.0])}


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty.log").write_text("nothing here\n")
    for path in (tmp_path / "none", tmp_path / "empty.log"):
        assert run_tool("plot_run", path, "--output", tmp_path / "run.png") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"plot_run: {path} ")
        assert error.count("\n") == 1
    assert not (tmp_path / "run.png").exists()
