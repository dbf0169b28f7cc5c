"""A tiny model trained with FPDT finds needles in other chunks; a control whose chunks are kept apart does not."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launcher import REPOSITORY
from tests.integration.shell import run

SCRIPT = REPOSITORY / "examples_deepspeed/long_context_eval/recall.sh"
CHUNK = 32
CHANCE = 1 / 16


@dataclass(frozen=True)
class Search:
    """Mean accuracy where the needle is in the last chunk of the prompt, and where it is in one before."""

    near: float
    far: float
    longest_far: float


def read_search(folder: Path) -> Search:
    cells = json.loads((folder / "needle.json").read_text())["cells"]
    near, far = [], []
    for cell in cells:
        place, last_chunk = round(cell["depth"] * (cell["length"] - 4)), (cell["length"] - 2) // CHUNK * CHUNK
        (near if place >= last_chunk else far).append(cell)
    longest = [cell for cell in far if cell["length"] == max(each["length"] for each in far)]
    assert len(near) >= 5
    assert len(far) >= 10
    return Search(*(sum(cell["accuracy"] for cell in part) / len(part) for part in (near, far, longest)))


@pytest.mark.slow
def test_only_a_model_whose_chunks_see_each_other_finds_what_is_far(tmp_path: Path) -> None:
    run(str(SCRIPT), tmp_path, OUT=str(tmp_path / "out"))
    model, control = (read_search(tmp_path / "out" / name) for name in ("model", "control"))
    assert model.near > 0.9
    assert model.far > 0.9
    assert model.longest_far > 0.75  # a quarter as long again as in training
    assert control.near > 0.9
    assert control.far < 3 * CHANCE
    assert all((tmp_path / "out" / name / "needle.png").is_file() for name in ("model", "control"))
