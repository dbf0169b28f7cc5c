"""`pretrain_gpt.py` on data of which the tenth sample cannot be read."""

import runpy
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
UNREADABLE = 9

if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    from megatron.data.gpt_dataset import GPTDataset

    read_sample = GPTDataset.__getitem__

    def read_or_fail(dataset: GPTDataset, index: int) -> Any:
        if index == UNREADABLE:
            raise RuntimeError("the disk is gone")
        return read_sample(dataset, index)

    GPTDataset.__getitem__ = read_or_fail  # type: ignore[method-assign]
    runpy.run_path(str(REPOSITORY / "pretrain_gpt.py"), run_name="__main__")
