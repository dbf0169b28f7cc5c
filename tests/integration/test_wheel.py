"""The commands of a wheel that is installed into an environment of its own, used from another folder."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.distributed.launcher import REPOSITORY
from ulysses_offload.commands import OTHER_TOOLS

COMMANDS = (
    *("pretrain", "finetune", "plan", "convert", "preprocess", "generate"),
    *(f"evaluate {name}" for name in ("--help", "needle", "ruler", "harness")),
    *(f"tool {name}" for name in OTHER_TOOLS),
)

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, expected: int = 0) -> str:
    finished = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}
    )
    assert finished.returncode == expected, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a wheel of the tracked files into a new environment, whose other packages are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv = folder / "source", folder / "venv"
    run("git", "clone", "--quiet", REPOSITORY, source, cwd=folder)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", venv, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_its_help(environment: Path, tmp_path: Path, name: str) -> None:
    program, *words = name.split()
    assert "usage: " in run(environment / f"bin/ulysses-{program}", *words, "--help", cwd=tmp_path)


def test_commands_work_away_from_the_checkout(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "1 2 3 4 5 6 7 8 9"}\n' * 40)
    tokenizer = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "16")
    preprocess = environment / "bin/ulysses-preprocess"
    words = ("--input", "corpus.jsonl", "--output-prefix", "corpus", "--append-eod", "--workers", "2")
    assert "400 tokens" in run(preprocess, *words, *tokenizer, cwd=tmp_path)
    assert "8.03B parameters on 4 H100" in run(
        environment / "bin/ulysses-plan", "--model", "llama-8b", "--gpus", "4", "--gpu", "H100", cwd=tmp_path
    )
    sizes = ("--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "32")
    training = ("--train-iters", "1", "--lr", "1e-3", "--eval-iters", "0", "--log-interval", "1")
    data = ("--data-path", "corpus_text_document", "--split", "100,0,0", *tokenizer)
    launcher = (environment / "bin/python", "-m", "torch.distributed.run", "--nproc-per-node", "1", "--no-python")
    log = run(*launcher, environment / "bin/ulysses-pretrain", *sizes, *training, *data, cwd=tmp_path)
    assert "lm loss" in log


def test_megatron_core_in_the_same_environment_is_reported(environment: Path, tmp_path: Path) -> None:
    (packages,) = environment.glob("lib/python*/site-packages")
    info = packages / "megatron_core-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.1\n")
    (info / "RECORD").write_text("megatron/core/__init__.py,,\n")
    report = run(environment / "bin/ulysses-plan", "--help", cwd=tmp_path, expected=2)
    assert report.startswith("error: megatron-core is installed in the same environment")
