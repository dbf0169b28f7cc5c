"""The parent process of a rank: exit codes, signals in both directions, and the line about a fatal one."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.ranks.supervisor import LastPlace

REPOSITORY = Path(__file__).parents[3]
LAUNCHED = {**os.environ, "CROSS_SIZE": "1", "RANK": "3"}
START = """
import os, signal, sys, time
from megatron.ranks.supervisor import supervise
started = os.getpid()
record_place = supervise()
"""
LOOP = """
print("ready", flush=True)
for _ in range(6000):  # a minute, should its supervisor leave it behind
    time.sleep(0.01)
"""
OUT_OF_MEMORY = "; the kernel's out-of-memory killer does this when host memory runs out"


def start(code: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", START + code],
        cwd=REPOSITORY,
        env={**LAUNCHED, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_loop(code: str = "") -> "subprocess.Popen[str]":
    """Start a program that runs `code` and then waits, and return once it waits."""
    process = start(code + LOOP)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end_of(code: str, **environment: str) -> tuple[int, str, str]:
    """Return the exit code and the two streams of a program that has called `supervise`."""
    process = start(code, **environment)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize(
    "code, expected",
    [
        ("sys.exit(0)", 0),
        ("os._exit(5)", 5),
        ("raise ValueError('its own traceback')", 1),
    ],
)
def test_a_rank_that_ends_by_itself_keeps_its_exit_code_and_streams(code: str, expected: int) -> None:
    exit_code, stdout, stderr = end_of(f"print('printed', flush=True)\n{code}")
    assert (exit_code, stdout) == (expected, "printed\n")
    assert stderr.endswith("ValueError: its own traceback\n") if expected == 1 else not stderr


@pytest.mark.parametrize(
    "code, said",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", f"SIGKILL in starting{OUT_OF_MEMORY}"),
        (
            "record_place('step 1'); record_place('é'); os.kill(os.getpid(), signal.SIGKILL)",
            f"SIGKILL in é{OUT_OF_MEMORY}",
        ),
        ("record_place('step 2'); os.kill(os.getpid(), signal.SIGUSR1)", "SIGUSR1 in step 2"),
        ("record_place('step 2'); os.kill(os.getpid(), 40)", "signal 40 in step 2"),
    ],
)
def test_a_rank_that_a_signal_killed_is_reported_with_its_place(code: str, said: str) -> None:
    ended = end_of(code, PYTHONIOENCODING="utf-8")
    assert ended == (4, "", f"error on rank 3: it was killed by {said}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_is_forwarded_to_the_rank(number: signal.Signals) -> None:
    process = start_loop(f"signal.signal({number:d}, lambda *_: os._exit(7))")
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 7


def test_a_rank_that_a_request_ends_is_no_fault() -> None:
    process = start_loop()
    process.terminate()
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 128 + signal.SIGTERM


def test_a_rank_that_is_killed_after_a_request_to_end_is_not_taken_for_out_of_memory() -> None:
    process = start_loop("signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))")
    process.terminate()
    assert process.communicate(timeout=60)[1] == (
        "error on rank 3: it was killed by SIGKILL in starting, after a request to end\n"
    )
    assert process.returncode == 4


def test_a_rank_dies_with_its_supervisor() -> None:
    process = start_loop()
    process.kill()
    assert process.communicate(timeout=60) == ("", "")  # the streams end with the last process that has them


def test_the_terminal_s_ctrl_c_reaches_the_rank_once() -> None:
    code = """
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
"""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(REPOSITORY)
        os.execve(sys.executable, [sys.executable, "-c", START + code + LOOP], LAUNCHED)
    with os.fdopen(terminal, "rb+", buffering=0) as stream:
        read_until(stream.fileno(), "ready")
        stream.write(b"\x03")
        output = read_until(stream.fileno(), "interrupted")
        os.kill(process, signal.SIGTERM)  # which is forwarded after whatever came before
        output += read_until(stream.fileno(), None)
    assert output.count("interrupted") == 1
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7


def read_until(terminal: int, text: str | None) -> str:
    """Read from a terminal until `text` has come, or to its end."""
    output = ""
    while text is None or text not in output:
        try:
            output += os.read(terminal, 1024).decode()
        except OSError:  # how Linux reports the end
            assert text is None, output
            break
    return output


@pytest.mark.parametrize("environment", [{}, {"CROSS_SIZE": "1", "CUDA_INJECTION64_PATH": "libtool.so"}])
def test_there_is_no_supervisor_without_the_launcher_or_with_a_profiler(environment: dict[str, str]) -> None:
    others = {name: value for name, value in LAUNCHED.items() if name not in ("CROSS_SIZE", "CUDA_INJECTION64_PATH")}
    code = START + "print(record_place, os.getpid() == started)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**others, **environment}, capture_output=True, text=True
    )
    assert run.stdout == "None True\n", run.stderr


def test_a_supervisor_is_small() -> None:
    code, stdout, _ = end_of("print(os.getpid() != started, {'torch', 'numpy', 'deepspeed'} & sys.modules.keys())")
    assert (code, stdout) == (0, "True set()\n")


@pytest.mark.parametrize("program", ["pretrain_gpt.py", "finetune_llama.py"])
def test_the_programs_fork_before_their_large_imports(program: str) -> None:
    text = (REPOSITORY / program).read_text()
    assert text.index("    record_place = supervise()\n") < text.index("\nfrom megatron")
    assert text.endswith("leave(main(sys.argv[1:], record_place))\n")


def test_a_place_that_exceeds_a_page_is_cut_off_at_a_character() -> None:
    place = LastPlace()
    place.record("é" * 5000)
    assert place.read() == "é" * 2047
    place.record("loading /\udcff")  # a name that is no UTF-8
    assert place.read() == "loading /\\udcff"
