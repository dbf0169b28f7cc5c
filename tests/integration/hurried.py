"""`pretrain_gpt.py` with a training clock that runs a thousand times faster, so that minutes pass in a test."""

import sys
import time
from types import SimpleNamespace

import megatron.training
from pretrain_gpt import main

FACTOR = 1000.0

if __name__ == "__main__":
    megatron.training.time = SimpleNamespace(monotonic=lambda: FACTOR * time.monotonic())  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
