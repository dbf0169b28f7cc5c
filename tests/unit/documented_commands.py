"""The commands that the documentation and the programs' own heads show, as a reader would type them."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launcher import REPOSITORY
from ulysses_offload.commands import EVALUATIONS, OTHER_TOOLS

# The tutorial's commands are all run, by tests/integration/test_tutorial.py.
RUN_ELSEWHERE = {"tutorial.md"}
TRAINING = ("pretrain_gpt.py", "finetune_llama.py")
PAGES = sorted(
    path
    for folder in (REPOSITORY, REPOSITORY / "docs", REPOSITORY / "examples_deepspeed")
    for path in folder.glob("*.md")
    if path.name not in RUN_ELSEWHERE
)
PROGRAMS = [
    *(REPOSITORY / name for name in TRAINING),
    *sorted(path for folder in ("tools", "benchmarks") for path in (REPOSITORY / folder).glob("*.py")),
]
# What stands for flags that a reader has, and for the program where it does not matter which.
PLACEHOLDERS = ("...", "MODEL_FLAGS", "FLAGS OF pretrain_gpt.py")

# Other ways to start a program: the commands of an installation, and the script for SLURM.
ALIASES = {
    "ulysses-pretrain": "pretrain_gpt.py",
    "ulysses-finetune": "finetune_llama.py",
    "ulysses-plan": "tools/plan_context.py",
    "ulysses-convert": "tools/hf2megads_weight_converter.py",
    "ulysses-preprocess": "tools/preprocess_data.py",
    "ulysses-generate": "tools/generate_samples_gpt.py",
    "examples_deepspeed/slurm/train.sh": "pretrain_gpt.py",
}
# Commands whose first word chooses a script.
CHOICES = {"ulysses-evaluate": EVALUATIONS, "ulysses-tool": OTHER_TOOLS}

_OTHER_PROGRAMS = "|".join(map(re.escape, (*TRAINING, *ALIASES, *CHOICES)))
_PROGRAM = rf"(?:(?:tools|benchmarks)/\w+\.py|{_OTHER_PROGRAMS})"
_LAUNCHER = r"(?:python +|deepspeed +(?:--\w+ +(?:\d+ +)?)*|sbatch +(?:--[\w-]+ +\w+ +)*)?"
_LINE = re.compile(rf"^(?:[A-Z_]+=\S+ +)*{_LAUNCHER}({_PROGRAM})(?:\s+(.*))?$")
_PARTIAL = re.compile(r"^\.\.\. (--.*)$")
_RANKS = re.compile(r"deepspeed +--num_gpus +(\d+)")
_SPAN = re.compile(r"`([^`\n]+)`")
_CONTINUATION = re.compile(r"\s*\\\n\s*")
_REMARK = "  "  # sets off words from a command


@dataclass(frozen=True)
class Command:
    """A command of a page: the program's path, its words, and how many ranks the launcher starts."""

    page: str
    program: str
    words: tuple[str, ...]
    num_ranks: int = 1

    def __str__(self) -> str:
        return f"{self.page}: {self.program} {' '.join(self.words)}"


def commands() -> list[Command]:
    """Every command of the pages and of the heads of the programs, each once."""
    found = [command for path in (*PAGES, *PROGRAMS) for command in commands_in(path)]
    return list(dict.fromkeys(found))


def commands_in(path: Path) -> Iterator[Command]:
    """The commands of a page, which stand on lines of their own or as `code`, or in the docstring of a program."""
    text = path.read_text(encoding="utf-8")
    is_program = path.suffix == ".py"
    text = (ast.get_docstring(ast.parse(text)) or "") if is_program else text
    for line in _CONTINUATION.sub(" ", text).splitlines():
        candidates = (line, *(span for span in _SPAN.findall(line) if " " in span))
        found = (command_of(each, path.name) for each in candidates)
        yield from (each for each in found if each is not None)


def command_of(line: str, page: str) -> Command | None:
    """The command that a line consists of, but for a remark behind it; None where it is none."""
    line = line.strip().split(_REMARK)[0]
    if partial := _PARTIAL.match(line):
        return Command(page, TRAINING[0], ("...", *shlex.split(partial[1])))
    match = _LINE.match(line)
    if match is None:
        return None
    ranks = _RANKS.search(line)
    program, rest = match[1], match[2] or ""
    for placeholder in PLACEHOLDERS:
        rest = rest.replace(placeholder, "...")
    words = tuple(shlex.split(rest, comments=True))
    if program in CHOICES:
        if not words or words[0] not in CHOICES[program]:
            return None
        choice = CHOICES[program][words[0]]
        return Command(page, f"tools/{choice.script}", (*choice.words, *words[1:]))
    return Command(page, ALIASES.get(program, program), words, int(ranks[1]) if ranks else 1)
