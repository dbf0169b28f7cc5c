"""Every command of docs/tutorial.md runs, in order and in one folder, and what it promises is there.

The text of the blocks is run as it stands but for the lengths in SHORTER. The reader's folder looks like the
repository; what installs something is told by the environment to change nothing.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.generation.loading import Inference, OpenedModel
from tests.distributed.launcher import REPOSITORY, TrainingRun, free_port, read_log
from tests.integration.readme import local_links, shell_blocks
from tests.integration.shell import run

TUTORIAL = REPOSITORY / "docs/tutorial.md"
REPOSITORY_FILES = (
    "Makefile", "examples_deepspeed", "finetune_llama.py", "megatron", "pretrain_gpt.py", "pyproject.toml", "setup.py",
    "tools",
)  # fmt: skip
# Flags of the tutorial, and the values that they have here; fine-tuning is short as it is.
SHORTER = {
    "--train-iters": {"100": "6", "200": "9", "60": "2", "20": "2", "40": "40", "500": "4"},
    "--lr-warmup-iters": {"10": "2", "5": "1", "30": "1"},
    "--log-interval": {"10": "1", "5": "1", "25": "2"},
    "--eval-interval": {"50": "3", "30": "2", "100": "2"},
    "--eval-iters": {"4": "1", "8": "1"},
    "--documents": {"10000": "400"},
    "--trials": {"2": "1", "8": "1"},
    "--depths": {"5": "2"},
}
# As many processes as GPUs, where there are some.
RANKS = "ranks=1" if torch.cuda.device_count() == 1 else "ranks=2"
INSTALL_NOTHING = {"MAKEFLAGS": "--dry-run", "PIP_NO_INDEX": "1"}
MARK = "--- block"


@dataclass(frozen=True)
class Walk:
    """The folder in which the tutorial was run, and what each block wrote, by a word that only it has."""

    folder: Path
    outputs: dict[str, str]

    def output(self, words: str) -> str:
        """What the one block wrote whose text has these words."""
        (output,) = [output for block, output in self.outputs.items() if words in block]
        return output

    def training(self, words: str) -> TrainingRun:
        """What the log of the run says that the block started."""
        return read_log(self.output(words))

    @property
    def made(self) -> Path:
        """The folder that the tutorial writes to."""
        return self.folder / "tutorial"


def shortened(block: str) -> str:
    """The block with the lengths that a test can wait for."""
    flags = "|".join(SHORTER)
    block = block.replace("ranks=2", RANKS)
    return re.sub(rf"({flags}) (\S+)", lambda match: f"{match[1]} {SHORTER[match[1]][match[2]]}", block)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Type in the whole tutorial."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in REPOSITORY_FILES:
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    blocks = shell_blocks(TUTORIAL)
    # The launcher's own port may be taken by another run of this machine.
    own_port = f'deepspeed() {{ command deepspeed --master_port {free_port()} "$@"; }}\n'
    script = own_port + "".join(f"echo '{MARK}'\n{shortened(block)}" for block in blocks)
    _, *outputs = run(script, folder, **INSTALL_NOTHING).split(f"{MARK}\n")
    return Walk(folder, dict(zip(blocks, outputs, strict=True)))


def test_every_link_leads_somewhere() -> None:
    links = local_links(TUTORIAL)
    assert links
    assert [link for link in links if not (TUTORIAL.parent / link).exists()] == []


def test_pictures_are_drawn(walk: Walk) -> None:
    for name in ("lengths", "plan", "short", "both", "needle/needle", "recall/needle"):
        assert (walk.made / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_losses_by_position_and_needles(walk: Walk) -> None:
    page = (walk.made / "recall/report.html").read_text()
    (data,) = re.findall(r'id="report">(.*)</script>', page)
    cards = {card["title"]: card for card in json.loads(data)["cards"]}
    assert [series["name"] for series in cards["Validation loss by position"]["series"]] == [
        "iteration 2",
        "iteration 4",
    ]
    assert len(cards["Needles found"]["cells"]) == 5 * 2
    assert cards["Memory by owner, rank 0"]["rows"]


def test_a_document_and_a_plan_are_shown(walk: Walk) -> None:
    assert "tokens per document" in walk.output("inspect_dataset")
    plan = walk.output("plan_context")
    assert "on 4 H100, 1,048,576 tokens" in plan
    assert "it fits; flags: --seq-length 1048576" in plan
    assert walk.output("DRY_RUN=1").startswith("deepspeed ")


def test_the_loss_falls_and_the_same_command_goes_on(walk: Walk) -> None:
    first, resumed = walk.training("--train-iters 100"), walk.training("--train-iters 200")
    assert list(first.losses) == [1, 2, 3, 4, 5, 6]
    assert list(resumed.losses) == [7, 8, 9]
    assert max(resumed.losses.values()) < first.losses[1]
    assert resumed.validation_losses[9] < first.validation_losses[6] < first.validation_losses[3]
    assert (walk.made / "short/latest").read_text() == "global_step9"
    assert "so none are evaluated" not in first.output  # the tutorial's --split leaves no test data, as it says


def test_the_longer_context_begins_where_the_short_one_ended(walk: Walk) -> None:
    short, long = walk.training("--train-iters 100"), walk.training("--change-rope")
    assert list(long.losses) == [1, 2]
    assert max(long.losses.values()) < short.losses[3]
    buckets = re.findall(r"(\d+-\d+): \d", long.output.split("loss by position at iteration 2")[1].splitlines()[0])
    assert buckets == ["0-256", "256-512", "512-1024", "1024-2048", "2048-4096", "4096-8192"]


def test_what_the_model_makes_of_its_context_is_measured(walk: Walk) -> None:
    for name in ("short", "long"):
        content = json.loads((walk.made / f"{name}.json").read_text())
        assert [(each["context"], each["num_tokens"]) for each in content["contexts"]] == [
            (512, 512), (1792, 512), (7936, 512),
        ]  # fmt: skip
    cells = json.loads((walk.made / "needle/needle.json").read_text())["cells"]
    assert {cell["length"] for cell in cells} == {512, 2048, 8192}


def test_transformers_reads_the_export_and_agrees(walk: Walk) -> None:
    text = walk.output("to-hf").rpartition("\nshard 1")[0].strip()
    assert text.startswith("def __init__(self")
    assert walk.output("from transformers import").strip() == text
    theirs = AutoModelForCausalLM.from_pretrained(walk.made / "hf")
    ours = OpenedModel(walk.made / "long").build(Inference(torch.device("cpu"), torch.float32, 512), 1024)
    tokens = torch.arange(1024)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens[None]).logits[0, -1], ours.prefill(tokens.tolist())[1])


def test_a_hugging_face_model_is_continued_and_exported(walk: Walk) -> None:
    first, continued = walk.training("--train-iters 100"), walk.training("--hf-model tutorial/hf")
    assert list(continued.losses) == [1, 2]
    assert max(continued.losses.values()) < first.losses[1]
    assert "chosen with --hf-model:" in continued.output
    assert (walk.made / "continued/latest").read_text() == "global_step2"
    AutoModelForCausalLM.from_pretrained(walk.made / "continued_hf")


def test_the_fine_tuned_model_answers_as_it_was_taught(walk: Walk) -> None:
    block = "finetune_llama.py"
    training = walk.training(block)
    assert training.losses[40] < 0.1 * training.losses[1]
    assert walk.output(block).rstrip().endswith("Where do the chunks rest?\n\nAssistant:\nIn the memory of the host.")
