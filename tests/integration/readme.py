"""The commands and links of the README and of other documents, as a reader would type and follow them."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.distributed.launcher import REPOSITORY

README = REPOSITORY / "README.md"

_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#]+)\)")
_MAP = re.compile(r"^## Where things are\n(.*?)^## ", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"^[A-Z_]+=")


@dataclass(frozen=True)
class Command:
    """One command: its text, the variables set in front of it, and its words."""

    text: str
    variables: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """What is run: the script where an interpreter or launcher runs one."""
        runs_a_script = self.words[0] in ("python", "deepspeed")
        return next(word for word in self.words if word.endswith(".py")) if runs_a_script else self.words[0]


def shell_blocks(document: Path) -> list[str]:
    """Return the text of every shell block, in order."""
    return _BLOCK.findall(document.read_text(encoding="utf-8"))


@cache
def commands() -> tuple[Command, ...]:
    """Return every command of every shell block, in order."""
    lines = "".join(shell_blocks(README)).replace("\\\n", " ").splitlines()
    return tuple(_command(line) for line in lines if line.strip())


def _command(line: str) -> Command:
    words = shlex.split(line, comments=True)
    variables = [word for word in words if _ASSIGNMENT.match(word)] if words[0] != "export" else []
    return Command(line, tuple(variables), tuple(words[len(variables) :]))


def commands_of(start: str) -> list[Command]:
    """Return the commands whose program's name starts so."""
    return [command for command in commands() if command.program.startswith(start)]


def local_links(document: Path = README) -> list[str]:
    """Return what a document links to within the repository, from its folder."""
    return [link for link in _LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]


def mapped_paths() -> list[str]:
    """Return the paths in the first column of the map of the repository."""
    (section,) = _MAP.findall(README.read_text(encoding="utf-8"))
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [path for row in rows for path in re.findall(r"`([^`]+)`", row)]
