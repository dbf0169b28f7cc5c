"""Every command that the documentation shows is one that its program takes."""

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

import pretrain_gpt
from megatron.arguments import build_parser, parse_args
from megatron.config import validate
from tests.distributed.launcher import REPOSITORY
from tests.unit.config.commands import DATA, GPT
from tests.unit.documented_commands import PAGES, PROGRAMS, TRAINING, Command, command_of, commands
from tests.unit.tools.tool import load_tool

FROM_A_GPU = ("--profile",)  # a flag of benchmarks that needs one there
# Of pip, docker, SLURM, torchrun, and of DeepSpeed's launcher and converter.
FOREIGN_FLAGS = {
    *("--no-build-isolation", "--ulimit", "--ipc", "--device", "--volume"),
    *("--ntasks-per-node", "--gpus-per-node", "--partition", "--account", "--signal", "--requeue"),
    *(
        "--shutdown-timeout",
        "--max-restarts",
        "--num-gpus",
        "--no-ssh",
        "--node-rank",
        "--master-addr",
        "--inject-missing-state",
    ),
}
WRITTEN_FROM_THE_CODE = "arguments.md"
SPAN = re.compile(r"`([^`\n]+)`")
FLAG = re.compile(r"(?<![\w-])--[a-z](?:[\w-]*\w)?(?![\w-])")
MAKE = re.compile(r"(?:^ *|`)make ([a-z][a-z-]*)", re.MULTILINE)
SCRIPT = re.compile(r"(?<![\w./$-])((?:\w+/)+[\w.]+\.sh)")
PATH = re.compile(r"^((?:megatron|tools|tests|benchmarks|examples_deepspeed|docs)/[\w./-]+?)(?::\d+)?$")


def filled_in(command: Command) -> list[str]:
    """The words of a command, with flags of a small model, and of data where it names none, in place of "..."."""
    flags = [*GPT, "--train-iters", "10", *([] if "--tokenizer-type" in command.words else DATA)]
    return [part for word in command.words for part in (flags if word == "..." else [word])]


def take(command: Command) -> None:
    """Let the program's own parser, and what checks its flags together, take the words."""
    words, (folder, _, name) = filled_in(command), command.program.removesuffix(".py").rpartition("/")
    if command.program in TRAINING:
        config = parse_args(words)
        if config.model.hf_model is None:  # the folder, which a reader has, decides on the rest
            validate(config, command.num_ranks, "cuda")
        assert command.program != TRAINING[0] or not config.given & {*pretrain_gpt.FINETUNING_FLAGS}
    elif folder == "tools":
        arguments = load_tool(name).parse_arguments(words)
        if name == "plan_context" and arguments.training:
            parse_args(load_tool(name).completed(arguments.training))
    else:
        script = importlib.import_module(f"benchmarks.{name}")
        on_cpu = ["--device", "cpu"] * hasattr(script, "build_parser")
        script.parse_arguments([*(word for word in words if word not in FROM_A_GPU), *on_cpu])


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_documented_command_is_taken(command: Command) -> None:
    if "--help" not in command.words:
        take(command)
        return
    with pytest.raises(SystemExit, match="0"):
        take(command)


def test_commands_are_found_wherever_they_stand() -> None:
    found = commands()
    assert {command.program for command in found} >= {*TRAINING, "benchmarks/planner.py", "tools/plan_context.py"}
    shown = {Path(command.program).name for command in found}
    no_programs = {"__init__.py", "alst.py", "block.py", "common.py", "deepspeed_layer.py", "loopback.py",
                   "model_arguments.py", "argument_types.py", "progress_bar.py", "run_flags.py",
                   "upstream_converter.py"}  # fmt: skip
    assert {path.name for path in PROGRAMS} - shown == no_programs


@pytest.mark.parametrize(
    "line, program, words, num_ranks",
    [
        ("    python tools/plot_run.py runs/a   # a remark", "tools/plot_run.py", ("runs/a",), 1),
        ("    tools/merge_datasets.py --input a    a remark", "tools/merge_datasets.py", ("--input", "a"), 1),
        ("ulysses-plan --gpus 4", "tools/plan_context.py", ("--gpus", "4"), 1),
        ("sbatch --nodes 4 examples_deepspeed/slurm/train.sh --lr 1", "pretrain_gpt.py", ("--lr", "1"), 1),
        ("A=1 deepspeed --num_gpus 4 pretrain_gpt.py ... --lr 1", "pretrain_gpt.py", ("...", "--lr", "1"), 4),
        ("... --lr 1", "pretrain_gpt.py", ("...", "--lr", "1"), 1),
    ],
)
def test_a_line_is_read_as_a_command(line: str, program: str, words: tuple[str, ...], num_ranks: int) -> None:
    assert command_of(line, "page") == Command("page", program, words, num_ranks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_a_page_is_one_of_some_program(page: Path) -> None:
    flags = {flag.replace("_", "-") for span in spans_of(page) for flag in FLAG.findall(span)}
    assert page.name == WRITTEN_FROM_THE_CODE or sorted(flags - known_flags() - FOREIGN_FLAGS) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_a_page_exists(page: Path) -> None:
    paths = {path for span in spans_of(page) for path in PATH.findall(span)}
    assert sorted(path for path in paths if not (REPOSITORY / path).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_launch_script_and_make_target_of_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted({*MAKE.findall(text)} - {*targets}) == []
    folders = (REPOSITORY, page.parent)
    assert [path for path in SCRIPT.findall(text) if not any((folder / path).is_file() for folder in folders)] == []


def test_the_page_on_data_shows_every_tool_of_its_preparation() -> None:
    shown = {Path(command.program).stem for command in commands() if command.page == "data.md"}
    assert shown >= {"preprocess_data", "inspect_dataset", "merge_datasets"}


def spans_of(page: Path) -> list[str]:
    """What stands as `code` within a page's text."""
    return SPAN.findall(page.read_text(encoding="utf-8"))


@cache
def known_flags() -> frozenset[str]:
    """The flags of pretrain_gpt.py, and whatever the other programs' sources write as one."""
    texts = [path.read_text(encoding="utf-8") for path in PROGRAMS]
    ours = {option for action in build_parser()._actions for option in action.option_strings}
    return frozenset(ours.union(*(re.findall(r'"(--[\w-]+)"', text) for text in texts)))
