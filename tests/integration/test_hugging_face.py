"""A Hugging Face model, trained on with FPDT, goes back to Hugging Face: its losses are those of transformers.

Every document of the data is the same and as long as a sequence, so that every sample is the same too, whatever the
order, and transformers can be asked for the loss of a step.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron.data.indexed_dataset import IndexedDatasetWriter
from megatron.weights.safetensors_folder import SafetensorsFolder
from tests.integration.runs import OFFLOADED, Run, ranks, train
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import VOCAB, save

TOOL = "hf2megads_weight_converter"
LENGTH, ITERATIONS = 64, 6
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Story:
    """Folders of the stages, and the run between them."""

    theirs: Path
    checkpoints: Path
    back: Path
    flags: list[str]
    run: Run


def sample() -> np.ndarray:
    """The tokens of every document."""
    return np.random.default_rng(3).integers(0, VOCAB, LENGTH)


def write_data(prefix: Path) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(100):
            writer.add_document(sample())
    return prefix


def flags_printed(text: str) -> list[str]:
    """The flags that the converter ends with."""
    return text.splitlines()[-1].split()


def their_loss(folder: Path) -> float:
    """The loss of the sample in transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.from_numpy(sample())[None]
    with torch.no_grad():
        logits = model(tokens).logits
    return float(F.cross_entropy(logits[0], tokens[0].roll(-1)))


@pytest.fixture(
    scope="module", params=[("llama-llama3", 1), pytest.param(("qwen3-tied", 3), marks=pytest.mark.slow)], ids=str
)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Convert, train on two sequence-parallel ranks, and convert the training checkpoint back."""
    name, zero_stage = request.param
    folder = tmp_path_factory.mktemp("story")
    theirs, ours, checkpoints, back = (folder / part for part in ("theirs", "ours", "checkpoints", "back"))
    save(name, theirs, max_position_embeddings=LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        assert run_tool(TOOL, "to-megatron", theirs, ours) == 0
    architecture = flags_printed("\n".join(lines))
    flags = [*architecture[2:], "--seq-length", str(LENGTH), "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", str(VOCAB - 1), "--global-batch-size", "2", "--lr", "1e-2", "--log-interval", "1"]
    flags += ["--eval-iters", "0", "--data-path", str(write_data(folder / "data")), "--split", "100,0,0"]
    flags += [*OFFLOADED, *ranks(2, zero_stage)]
    stages = ["--load", str(ours), "--save", str(checkpoints), "--train-iters", str(ITERATIONS)]
    run = train([*flags, *stages], folder / "events", 2)
    assert run_tool(TOOL, "to-hf", checkpoints, back, "--like", theirs) == 0
    return Story(theirs, checkpoints, back, flags, run)


def test_training_begins_with_the_loss_of_transformers(story: Story) -> None:
    assert story.run.losses[1] == pytest.approx(their_loss(story.theirs), rel=TOLERANCE)


def test_what_was_trained_has_the_same_loss_in_transformers(story: Story, tmp_path: Path) -> None:
    once_more = train(
        [*story.flags, "--load", str(story.checkpoints), "--finetune", "--train-iters", "1"], tmp_path / "events", 2
    )
    loss = their_loss(story.back)
    assert once_more.losses[1] == pytest.approx(loss, rel=TOLERANCE)
    assert loss < 0.9 * story.run.losses[1]


def test_the_tensors_are_those_that_came(story: Story) -> None:
    theirs, back = SafetensorsFolder(story.theirs), SafetensorsFolder(story.back)
    assert theirs.names == back.names
    assert {name: theirs.shape(name) for name in theirs.names} == {name: back.shape(name) for name in back.names}
    assert not all(torch.equal(theirs.get(name), back.get(name)) for name in theirs.names)
