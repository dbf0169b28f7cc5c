"""What the tests of checkpointing share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.fixture
def only_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be the only rank of a gloo world."""
    meeting_point: Path = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
