"""`pretrain_gpt.py` with a training clock that rank 0 runs a thousand times faster, so that minutes pass in a test."""

import os
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

REPOSITORY = Path(__file__).resolve().parents[2]
FACTOR = 1000.0 if os.environ.get("RANK", "0") == "0" else 1.0

if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    import megatron.training.loop

    megatron.training.loop.time = SimpleNamespace(monotonic=lambda: FACTOR * time.monotonic())  # type: ignore[assignment]
    runpy.run_path(str(REPOSITORY / "pretrain_gpt.py"), run_name="__main__")
