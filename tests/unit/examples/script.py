"""Run a launch script up to the command that it would start."""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = REPOSITORY / "examples_deepspeed"
SCRIPTS = sorted(EXAMPLES.rglob("ds_*.sh"))
PATHS = {"DATA_PATH": "corpus_text_document", "VOCAB_FILE": "vocab.json", "MERGE_FILE": "merges.txt",
         "TOKENIZER_MODEL": "tokenizer.json", "LOAD": "elsewhere/checkpoints"}  # fmt: skip
PASSED_ON = ("PATH", "HOME", "TMPDIR")


@dataclass(frozen=True)
class Command:
    """What a script would start: the launcher's words, and the flags of pretrain_gpt.py; and the plan it prints."""

    launcher: list[str]
    flags: list[str]
    plan: str

    def value(self, flag: str) -> str:
        """Return the word after a flag."""
        return self.flags[self.flags.index(flag) + 1]


def run_script(script: Path, *arguments: str, num_gpus_found: int = 4, bin_folder: Path, **variables: str) -> Command:
    """Return the command of a dry run on a machine with so many GPUs.

    Raises:
        subprocess.CalledProcessError: the script refused; its `stderr` says why.
    """
    finished = run_program(script, *arguments, num_gpus_found=num_gpus_found, bin_folder=bin_folder, **variables)
    words = shlex.split(finished.stdout)
    program = words.index(str(REPOSITORY / "pretrain_gpt.py"))
    return Command(words[:program], words[program + 1 :], finished.stderr)


def run_program(
    script: Path, *arguments: str, num_gpus_found: int = 4, bin_folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Start a script for a dry run in `bin_folder`, where PATHS["LOAD"] holds weights.

    CalledProcessError if it refuses.
    """
    write_nvidia_smi(bin_folder, num_gpus_found)
    weights = bin_folder / PATHS["LOAD"]
    weights.mkdir(parents=True, exist_ok=True)
    (weights / "model.safetensors").touch()
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    return subprocess.run(
        [str(script), *arguments],
        cwd=bin_folder,
        env={**environment, "DRY_RUN": "1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )


def write_nvidia_smi(folder: Path, num_gpus: int) -> None:
    """Put a program called nvidia-smi into a folder, which lists so many GPUs."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\nfor i in $(seq 1 {num_gpus}); do echo "GPU $i: a GPU"; done\n')
    program.chmod(0o755)
