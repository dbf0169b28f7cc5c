"""The commands of an installation, and the check that no other megatron is in the way."""

import importlib
import tomllib
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import megatron
from tests.distributed.launcher import REPOSITORY
from tests.unit.documented_commands import ALIASES
from ulysses_offload import commands
from ulysses_offload.installation import DISTRIBUTION, ForeignMegatron, check_installation

SHARED = "megatron/core/__init__.py"


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


def test_every_command_runs_a_script_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts: list[Path] = []
    monkeypatch.setattr(commands, "run_script", scripts.append)
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    entries = settings["project"]["scripts"]
    for name, target in entries.items():
        module, _, function = target.partition(":")
        assert name == f"ulysses-{function}"
        getattr(importlib.import_module(module), function)()
    names = [str(script.relative_to(REPOSITORY)) for script in scripts]
    assert dict(zip(entries, names, strict=True)).items() <= ALIASES.items()
    assert all(script.is_file() for script in scripts)
