"""Fixtures and rules that all tests share."""

import signal
from collections.abc import Iterator

import pytest
import torch

from megatron.launch.determinism import use_deterministic_kernels
from tests.distributed.rank_pool import RankPool


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job, whose children would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the grid out unless it is asked for, and skip GPU tests where there is no GPU."""
    if "grid" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("grid")]
        items[:] = [item for item in items if not item.get_closest_marker("grid")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Return the pool of gloo ranks that all distributed tests share."""
    with RankPool() as pool:
        yield pool


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Run a test with --deterministic-mode."""
    use_deterministic_kernels("cuda" if torch.cuda.is_available() else "cpu")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
