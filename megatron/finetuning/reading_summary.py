"""Summary of reading a file of conversations: formats, counts, and what was left out and why."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron.core.json_text import parse_object
from megatron.finetuning.encoding import EncodedConversation

LOG = logging.getLogger("megatron")
VARYING = re.compile(r"\d+|'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True)
class LeftOut:
    """Conversations left out for one reason: how many, where the first is, and its reason in words."""

    count: int
    first: str
    reason: str


@dataclass(frozen=True)
class ReadingSummary:
    """What was read of one file."""

    path: Path
    kind: str
    formats: dict[str, int]
    """Conversations by format."""

    num_split: int
    """Conversations that became several samples."""

    num_samples: int
    num_tokens: int
    num_trained: int
    """Tokens that count in the loss."""

    num_open: int
    """Answers that no token ends."""

    num_skipped: int
    """Answers that count nowhere, since the template rewrites them."""

    left_out: tuple[LeftOut, ...]

    def to_json(self) -> bytes:
        """Return the JSON text without the path, as a copy of a file has the same summary."""
        values = asdict(self)
        del values["path"]
        return json.dumps(values).encode()

    @classmethod
    def parse(cls, path: Path, text: bytes) -> ReadingSummary:
        """Parse what `to_json` wrote."""
        values = parse_object(text)
        values["left_out"] = tuple(LeftOut(**entry) for entry in values["left_out"])
        return cls(path, **values)

    @property
    def num_left_out(self) -> int:
        """Number of conversations left out."""
        return sum(entry.count for entry in self.left_out)

    def log(self) -> None:
        """Report what was read, and what was left out, a line for each reason."""
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        LOG.info(
            "%s (%s): conversations %s; %d samples of %d tokens, %d trained (%.1f %%); %d left out",
            self.path, self.kind, formats, self.num_samples, self.num_tokens, self.num_trained,
            100 * self.num_trained / self.num_tokens, self.num_left_out,
        )  # fmt: skip
        if self.num_split:
            LOG.info(
                "%s: the chat template rewrites answers once turns follow, so %d conversations became several samples, "
                "each with the text that the model sees; --rewritten-answers skip trains one of each",
                self.path, self.num_split,
            )  # fmt: skip
        if self.num_skipped:
            LOG.warning(
                "%s: %d answers are left out of the loss, as the chat template rewrites them once turns follow; "
                "--rewritten-answers split trains them",
                self.path, self.num_skipped,
            )  # fmt: skip
        if self.num_open:
            LOG.warning(
                "%s: %d answers end without a token that says so, as the chat template writes none there; the model "
                "does not learn to stop after them; give a --chat-template that ends every answer",
                self.path, self.num_open,
            )  # fmt: skip
        for entry in self.left_out:
            LOG.warning("left out %d of %s; the first, %s: %s", entry.count, self.path, entry.first, entry.reason)

    def nothing_left(self) -> str:
        """Return the error for a file of which nothing is left."""
        if not self.left_out:
            return f"{self.path} holds no conversation; give a file with one JSON object on each line."
        first = self.left_out[0]
        return (
            f"{self.path}: all {self.num_left_out} conversations were left out; the first, {first.first}: "
            f"{first.reason}"
        )


@dataclass
class SummaryCounts:
    """Counts while a file is read."""

    path: Path
    kind: str
    formats: Counter[str] = field(default_factory=Counter)
    num_split: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    num_open: int = 0
    num_skipped: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    def take(self, chat_format: str, samples: Sequence[EncodedConversation]) -> None:
        """Count a conversation and its samples."""
        self.formats[chat_format] += 1
        self.num_split += len(samples) > 1
        self.num_samples += len(samples)
        self.num_tokens += sum(len(sample.tokens) for sample in samples)
        self.num_open += sum(sample.num_open for sample in samples)
        self.num_skipped += sum(sample.num_skipped for sample in samples)
        self.num_trained += sum(int(sample.is_answer[1:].sum()) for sample in samples)

    def leave_out(self, place: str, reason: str) -> None:
        """Count a conversation that is left out; reasons that differ in numbers and quoted words alone are one."""
        kind = VARYING.sub("_", reason)
        known = self.left_out.get(kind, LeftOut(0, place, reason))
        self.left_out[kind] = LeftOut(known.count + 1, known.first, known.reason)

    def summary(self) -> ReadingSummary:
        """Return the counts."""
        return ReadingSummary(
            self.path, self.kind, dict(self.formats), self.num_split, self.num_samples, self.num_tokens,
            self.num_trained, self.num_open, self.num_skipped, tuple(self.left_out.values()),
        )  # fmt: skip
