"""`pretrain_gpt.py` of which the last rank cannot write a file of more than 4 KiB, as on a disk that is full."""

import os
import resource
import runpy
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 4096

if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    runpy.run_path(str(REPOSITORY / "pretrain_gpt.py"), run_name="__main__")
