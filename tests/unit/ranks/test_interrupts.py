"""Ctrl-C in tools, and while a script imports."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.ranks.interrupts import run_tool

TOOLS = Path(__file__).parents[3] / "tools"
IMPORTED = ("argument_types.py", "model_arguments.py", "progress_bar.py", "upstream_converter.py")
OTHERS = ("draw_figures.py", "compact_log.py")  # the second ignores Ctrl-C, and ends with the run that it shows
USED_BY_HAND = [path for path in sorted(TOOLS.glob("*.py")) if path.name not in (*OTHERS, *IMPORTED)]


def test_a_tool_that_is_interrupted_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    assert run_tool(main) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run_tool(lambda: 2) == 2


@pytest.mark.parametrize("path", USED_BY_HAND, ids=lambda path: path.name)
def test_every_tool_is_run_so(path: Path) -> None:
    text = path.read_text()
    assert text.index("    end_on_interrupt()\n") < text.index("from megatron.ranks.interrupts import run_tool\n")
    assert "sys.exit(run_tool(" in text


@pytest.mark.parametrize(
    "settings, ended",
    [("", (130, "interrupted\n")), ("signal.signal(signal.SIGINT, signal.SIG_IGN); ", (0, "reached\n"))],
)
def test_a_script_that_imports_ends_at_once_unless_it_ignores_ctrl_c(settings: str, ended: tuple[int, str]) -> None:
    code = (
        "import os, signal, sys; from megatron.ranks.interrupts import end_on_interrupt; "
        f"{settings}end_on_interrupt(); "
        "os.kill(os.getpid(), signal.SIGINT); sys.stderr.write('reached\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOOLS.parent)
    assert (run.returncode, run.stderr) == ended


def test_a_tool_cleans_up_again_once_it_has_imported() -> None:
    code = (
        "import os, signal; from megatron.ranks.interrupts import end_on_interrupt, run_tool; end_on_interrupt()\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('cleaned up')\n"
        "raise SystemExit(run_tool(main))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOOLS.parent)
    assert (run.returncode, run.stdout, run.stderr) == (130, "cleaned up\n", "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
