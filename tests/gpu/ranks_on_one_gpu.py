"""pretrain_gpt.py with every rank on the first GPU, which NCCL refuses and gloo does not; run as that is."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from pretrain_gpt import leave, main

if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo")
    leave(main(sys.argv[1:]))
