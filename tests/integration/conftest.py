"""What the integration tests share."""

from pathlib import Path

import pytest

from tests.integration.corpus import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of the dataset that every run trains on."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "numbers")
