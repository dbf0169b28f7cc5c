"""A stand-in for SLURM on this machine: `sbatch`, `srun` and `scontrol`, as far as the launch script needs them.

    sbatch [--nodes N] [--ntasks-per-node N] SCRIPT ...    run the script, again for each requeue

Every task is a process of its own, on "nodes" that are all this machine. The script runs as a copy, as SLURM's does.
SIGUSR1 to `sbatch` stands for the signal before the time limit and reaches the script alone.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

NAMES = ("sbatch", "srun", "scontrol")
JOB = "4242"


def sbatch(words: list[str]) -> int:
    options: dict[str, str] = {}
    while words[0].startswith("--"):
        options[words[0]] = words[1]
        words = words[2:]
    script, state = Path(words[0]), Path(os.environ["SLURM_STATE"])
    header = dict(re.findall(r"^#SBATCH (--[\w-]+)=(\S+)", script.read_text(), re.MULTILINE))
    options = {**header, **options}
    nodes, per_node = int(options["--nodes"]), int(options["--ntasks-per-node"])
    copy = shutil.copy(script, state / "slurm_script")
    for restart in range(10):
        environment = {
            **os.environ,
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NAME": options["--job-name"],
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NTASKS": str(nodes * per_node),
            "SLURM_NTASKS_PER_NODE": str(per_node),
            "SLURM_SUBMIT_DIR": str(Path.cwd()),
        }
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        job = subprocess.Popen(["bash", copy, *words[1:]], env=environment, cwd=state)
        signal.signal(signal.SIGUSR1, lambda *_, job=job: job.send_signal(signal.SIGUSR1))
        code = job.wait()
        if not (state / "requeued").exists():
            return code
        (state / "requeued").unlink()
    return code


def srun(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    command = words[words.index("bash") :]
    number, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for task in range(number):
        environment = {**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % per_node)}
        with Path(options["--output"].replace("%t", str(task))).open("a") as log:
            tasks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("127.0.0.1\n127.0.0.1")
        return 0
    assert words == ["requeue", JOB], words
    (Path(os.environ["SLURM_STATE"]) / "requeued").touch()
    return 0


def install(folder: Path) -> None:
    """Write the three commands into a folder."""
    for name in NAMES:
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        (folder / name).chmod(0o755)


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
