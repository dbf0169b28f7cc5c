"""The commands of an installation, and the check that no other megatron is in the way."""

import importlib
import sys
import tomllib
from contextlib import nullcontext
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import megatron
from tests.distributed.launcher import REPOSITORY
from tests.unit.documented_commands import ALIASES, CHOICES
from ulysses_offload import commands
from ulysses_offload.commands import EVALUATIONS
from ulysses_offload.installation import DISTRIBUTION, ForeignMegatron, check_installation

SHARED = "megatron/core/__init__.py"
# Tools that make this repository's own documents and examples.
OF_THIS_REPOSITORY = {"document_arguments", "draw_figures", "make_recall_corpus", "make_stdlib_corpus"}


def installed(folder: Path, name: str, *files: str) -> PathDistribution:
    """Return a distribution with these files in its record."""
    info = folder / f"{name}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return PathDistribution(info)


def test_the_environment_of_the_tests_passes() -> None:
    check_installation()


def test_another_package_that_wrote_the_same_files_is_named(tmp_path: Path) -> None:
    ours = installed(tmp_path, DISTRIBUTION, SHARED, "megatron/fpdt/__init__.py")
    core = installed(tmp_path, "megatron-core", SHARED, "megatron/core/enums.py")
    energon = installed(tmp_path, "megatron-energon", "megatron/energon/__init__.py")
    check_installation([ours, energon], megatron.__file__)
    with pytest.raises(ForeignMegatron, match=f"megatron-core is installed .* has {SHARED} .*checkout of its source"):
        check_installation([ours, energon, core], megatron.__file__)


@pytest.mark.parametrize("origin, shown", [("/other/megatron/__init__.py", "/other"), ("", "without __init__.py")])
def test_another_megatron_that_comes_first_is_named(origin: str, shown: str) -> None:
    with pytest.raises(ForeignMegatron, match=f"{shown}.*PYTHONPATH"):
        check_installation([], origin)


def test_a_command_does_not_start_with_another_megatron(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ForeignMegatron("megatron-core is installed")

    monkeypatch.setattr(commands, "check_installation", refuse)
    with pytest.raises(SystemExit, match="2"):
        commands.plan()
    assert capsys.readouterr().err == "error: megatron-core is installed\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str]]]:
    """Return a list that gets the script and the command line of each command that is called, in place of its run."""
    found: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(commands, "run_script", lambda script: found.append((script, sys.argv)))
    return found


def test_the_commands_run_every_script_that_a_user_needs(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[Path, list[str]]]
) -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    for name, target in settings["project"]["scripts"].items():
        module, _, function = target.partition(":")
        assert name == f"ulysses-{function}"
        for choice in CHOICES.get(name, [""]):
            monkeypatch.setattr(sys, "argv", [name, choice, "--flag"])
            getattr(importlib.import_module(module), function)()
            script, argv = started[-1]
            assert script.is_file()
            if name in ALIASES:
                assert script == REPOSITORY / ALIASES[name]
            else:
                assert argv == [name, *CHOICES[name][choice].words, "--flag"]
    programs = {path for path in (REPOSITORY / "tools").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert {path.stem for path in programs - {script for script, _ in started}} == OF_THIS_REPOSITORY


@pytest.mark.parametrize("words, code", [(["--help"], None), ([], 2), (["rulr", "--load", "x"], 2)])
def test_a_command_lists_its_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], code: int | None
) -> None:
    monkeypatch.setattr(sys, "argv", ["ulysses-evaluate", *words])
    with pytest.raises(SystemExit, match=str(code)) if code else nullcontext():
        commands.evaluate()
    out, err = capsys.readouterr()
    assert all(f"\n  {name} " in out + err for name in EVALUATIONS)
    assert ("error: NAME" in err) == bool(code)
