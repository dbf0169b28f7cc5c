"""`pretrain_gpt.py` with pieces of memory and of files that suit a small model.

FAILING_RANK=1: the disk of that rank fails in the first step, with EIO.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron.fpdt import disk_budget, disk_files, disk_tier, staging
from megatron.fpdt.disk_tier import DiskTier
from megatron.launch import disk
from pretrain_gpt import leave, main

PIECE_BYTES, PIECES, WORKING_READS = 2**14, 8, 5


def fail(*_: Any) -> int:
    raise OSError(errno.EIO, "unplugged")


if __name__ == "__main__":
    for module in (disk, disk_budget, disk_files, disk_tier, staging):
        vars(module).update(STRIPE_BYTES=PIECE_BYTES, LEAST_STAGING_BYTES=PIECES * PIECE_BYTES)
    read, working = DiskTier._read, iter(range(WORKING_READS))

    def read_or_fail(tier: DiskTier, part: Any, piece: Any, after: Any) -> None:
        if os.environ["RANK"] == os.environ.get("FAILING_RANK") and next(working, None) is None:
            tier.files._transfer(fail, "reading", part.place, piece.view(part.num_bytes))
        read(tier, part, piece, after)

    DiskTier._read = read_or_fail  # type: ignore[method-assign]
    leave(main(sys.argv[1:]))
