"""Commands as a user types them."""

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed.launcher import REPOSITORY


def run(command: str, folder: Path, **variables: str) -> str:
    """Run a shell command in a folder with this Python in front; its output."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout
