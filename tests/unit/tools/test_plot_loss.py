import subprocess
import sys
from pathlib import Path

PLOT_LOSS = Path(__file__).parents[3] / "tools" / "plot_loss.py"
LINE = (
    " iteration {i:8d}/      20 | consumed samples: {i} | consumed tokens: {i} | "
    "elapsed time per iteration (ms): 1.0 | learning rate: 1.000E-04 | "
    "global batch size: 1 | lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 1.0 | "
    "tokens/s/GPU: 1.0 | model TFLOP/s: 1.0 | MFU: n/a | HFU: n/a | peak GPU memory (GiB): n/a | "
    "host memory (GiB): 1.0 | number of skipped iterations: 0 | number of nan iterations: 0 |\n"
)
EVALUATION = " validation loss at iteration {i} | lm loss value: {loss:.6E} | lm loss PPL: 1.0E+00 |\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PLOT_LOSS, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_log_becomes_a_picture(tmp_path):
    log = tmp_path / "train.log"
    text = (
        "starting\n" + "".join(LINE.format(i=i, loss=8 / i) for i in range(1, 21)) + EVALUATION.format(i=20, loss=0.5)
    )
    log.write_text(text)
    picture = tmp_path / "plots" / "loss.png"
    result = run(log, "--output", picture)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_log_without_iterations_is_refused_in_one_line(tmp_path):
    log = tmp_path / "empty.log"
    log.write_text("nothing here\n")
    result = run(log, "--output", tmp_path / "loss.png")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "empty.log has no line" in result.stderr
    assert not (tmp_path / "loss.png").exists()


def test_a_missing_log_is_refused_in_one_line(tmp_path):
    result = run(tmp_path / "none.log")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
