"""Every launch script trains, evaluates and saves at the tiny scale, through the deepspeed launcher."""

from pathlib import Path

import pytest

from tests.integration.launch_scripts import NEW, launch


@pytest.mark.parametrize("name", NEW)
def test_a_script_trains_evaluates_and_saves(tmp_path: Path, corpus: Path, name: str) -> None:
    training = launch(name, tmp_path, corpus, OUTPUT="out")
    assert list(training.losses) == [1, 2, 3, 4]
    assert list(training.validation_losses) == [2, 4]
    assert (tmp_path / "out/checkpoints/latest").read_text() == "global_step4"
