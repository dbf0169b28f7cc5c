"""The SLURM script on two "nodes" of a stand-in for SLURM, whose ranks train for real."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.launcher import REPOSITORY, free_port, read_log
from tests.integration.runs import FPDT, base_flags, ranks
from tests.integration.slurm import install

SCRIPT = "examples_deepspeed/slurm/train.sh"
SECONDS = 300.0
NUM_STEPS = 60


def submit(folder: Path, *flags: str, **variables: str) -> subprocess.Popen[str]:
    """Submit the script for two nodes of one rank each; its output goes to folder/slurm.out."""
    (folder / "bin").mkdir()
    install(folder / "bin")
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
        "OUTPUT": str(folder),
        "SLURM_STATE": str(folder),
        **variables,
    }
    command = ["sbatch", "--nodes", "2", "--ntasks-per-node", "1", SCRIPT, *flags]
    with (folder / "slurm.out").open("w") as log:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, text=True, process_group=0
        )


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_saves_before_its_time_limit_and_resumes_when_requeued(tmp_path: Path, corpus: Path) -> None:
    flags = [*base_flags(corpus), *FPDT, *ranks(2, 1), "--train-iters", str(NUM_STEPS), "--save-interval", "1000"]
    job = submit(tmp_path, *flags)
    log = tmp_path / "logs/rank_0.log"
    try:
        wait_until(lambda: log.exists() and bool(read_log(log.read_text()).losses), job)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(SECONDS) == 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    output = (tmp_path / "slurm.out").read_text()
    assert output.count("job 4242: 2 ranks on 2 machines, rank 0 on 127.0.0.1") == 2
    assert output.count("saved before the time limit; requeued") == 1
    # Both starts wrote to the same log, and no step was trained twice or left out.
    assert list(read_log(log.read_text()).losses) == list(range(1, NUM_STEPS + 1))
    assert (tmp_path / "checkpoints/latest").read_text() == f"global_step{NUM_STEPS}"


@pytest.mark.parametrize(
    "code, restarts, reason",
    [
        (4, 2, "exit code 4, restart 2 of at most 2; requeued"),
        (2, 0, "exit code 2; the reason is in"),
    ],
)
def test_a_job_is_requeued_after_a_lost_rank_but_not_after_an_error(
    tmp_path: Path, code: int, restarts: int, reason: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"import os, sys; print(os.environ['WORLD_SIZE'], *sys.argv[1:]); raise SystemExit({code})\n")
    job = submit(tmp_path, "--load", "weights", PROGRAM=str(program), MAX_RESTARTS="2")
    assert job.wait(SECONDS) == code
    output = (tmp_path / "slurm.out").read_text()
    assert reason in output
    assert output.count("; requeued") == restarts
    own = tmp_path / "checkpoints"
    assert (tmp_path / "logs/rank_1.log").read_text() == f"2 --load {own} --load weights --save {own}\n" * (
        restarts + 1
    )


def test_weights_to_start_from_are_not_loaded_over_a_checkpoint(tmp_path: Path) -> None:
    own = tmp_path / "checkpoints"
    own.mkdir()
    (own / "latest").write_text("global_step8")
    program = tmp_path / "program.py"
    program.write_text("import sys; print(*sys.argv[-3:])\n")
    assert submit(tmp_path, "--load", "weights", "--finetune", PROGRAM=str(program)).wait(SECONDS) == 0
    assert (tmp_path / "logs/rank_0.log").read_text() == f"--load {own} --finetune=false\n"
