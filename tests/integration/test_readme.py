"""What the README tells a reader to type works: targets and files exist, flags are known, the data commands run."""

import sys
from pathlib import Path

import pytest

from megatron.arguments import parse_args
from megatron.config.checks import validate
from megatron.data.indexed_dataset import IndexedDataset
from tests.distributed.launcher import REPOSITORY, TrainingRun, free_port, read_log
from tests.integration.readme import Command, commands, commands_of, local_links, mapped_paths
from tests.integration.shell import run
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import save

MADE_BY_MAKE = [".venv/bin/activate"]
TRAINING = ("pretrain_gpt.py", "finetune_llama.py")
PROGRAMS = ("git", "make", ".", "export", "tools/", "examples_deepspeed/", *TRAINING)
SOURCES = sorted((REPOSITORY / "megatron").rglob("*.py"))


def exports() -> str:
    """The lines that set variables for the commands after them."""
    return "\n".join(command.text for command in commands_of("export"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that looks like the repository, where the README's data commands have run on a small corpus."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("examples_deepspeed", "pretrain_gpt.py", "tools"):
        (folder / name).symlink_to(REPOSITORY / name)
    inputs = " ".join(str(path) for path in SOURCES)
    run(f"python - {inputs} > corpus.jsonl <<< '{TO_JSON}'", folder)
    save("llama-tied", folder / "models/Llama-3.2-1B")
    run_tool("hf2megads_weight_converter", "to-megatron", folder / "models/Llama-3.2-1B", folder / LLAMA_CHECKPOINTS)
    for command in commands_of("tools/"):
        run(command.text, folder)
    return folder


LLAMA_CHECKPOINTS = "runs/llama/checkpoints"
TO_JSON = 'import json, sys; [print(json.dumps({"text": open(name).read()})) for name in sys.argv[1:]]'


def test_every_command_is_of_a_kind_that_is_tested_here() -> None:
    assert len(commands()) > 5
    assert [command.text for command in commands() if not command.program.startswith(PROGRAMS)] == []


@pytest.mark.parametrize("command", commands_of("make"), ids=lambda command: "_".join(command.words))
def test_make_knows_every_target(command: Command) -> None:
    run(" ".join(["make", "--dry-run", *command.words[1:]]), REPOSITORY)


def test_every_link_program_and_mapped_path_exists() -> None:
    sourced = [command.words[1] for command in commands_of(".")]
    programs = [command.program for command in commands() if "/" in command.program]
    assert programs
    assert mapped_paths()
    assert [path for path in sourced if path not in MADE_BY_MAKE] == []
    missing = [path for path in (*local_links(), *mapped_paths(), *programs) if not (REPOSITORY / path).exists()]
    assert missing == []


def test_the_data_commands_make_a_dataset_where_the_launch_looks_for_it(prepared: Path) -> None:
    prefix, *files = run(f'{exports()}\necho "$DATA_PATH" "$VOCAB_FILE" "$MERGE_FILE"', prepared).split()
    assert IndexedDataset(prepared / prefix).num_documents == len([path for path in SOURCES if path.stat().st_size])
    assert [name for name in files if not (prepared / name).is_file()] == []


def test_the_flags_of_the_training_commands_are_known_and_go_together() -> None:
    trainings = [(command.words, command.words.index(name)) for name in TRAINING for command in commands_of(name)]
    configs = [(words, parse_args(words[script + 1 :])) for words, script in trainings]
    own = [(words, config) for words, config in configs if not config.model.hf_model]  # without a folder to read
    assert len(own) < len(configs)
    for words, config in own:
        validate(config, int(words[words.index("--num_gpus") + 1]), "cuda")


@pytest.mark.parametrize("command", commands_of("examples_deepspeed/"), ids=lambda c: "_".join(c.variables) or "full")
def test_every_launch_can_be_printed(prepared: Path, command: Command) -> None:
    printed = run(f"{exports()}\n{command.text}", prepared, DRY_RUN="1", NUM_GPUS="2")
    assert printed.startswith("deepspeed ")


def tiny_launch(folder: Path, output: str, **variables: str) -> TrainingRun:
    """Run the README's tiny launch; what its log says."""
    (command,) = [each for each in commands_of("examples_deepspeed/") if "MODEL_SCALE=tiny" in each.variables]
    text = run(f"{exports()}\n{command.text}", folder, MASTER_PORT=str(free_port()), OUTPUT=output, **variables)
    return read_log(text)


def test_the_tiny_launch_trains_evaluates_and_saves(prepared: Path) -> None:
    training = tiny_launch(prepared, "once")
    assert list(training.losses) == [1, 2, 3, 4]
    assert list(training.validation_losses) == [2, 4]
    assert (prepared / "once/checkpoints/latest").read_text() == "global_step4"
    assert (prepared / "once/train.log").is_file()


@pytest.mark.slow
def test_a_launch_that_is_started_again_goes_on(prepared: Path) -> None:
    tiny_launch(prepared, "twice")
    assert list(tiny_launch(prepared, "twice", TRAIN_TOKENS=str(5 * 4096)).losses) == [5]


@pytest.mark.slow
def test_the_quickstart_leaves_a_checkpoint_and_a_curve(tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = Path(sys.executable).parents[1]
    run("tools/quickstart.sh", REPOSITORY, VENV=str(environment), OUT=str(out))
    assert (out / "checkpoints" / "latest").is_file()
    assert (out / "loss.png").is_file()
