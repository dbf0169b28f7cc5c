"""Settings for turning conversations into samples."""

from dataclasses import dataclass
from typing import Literal

LongSamples = Literal["error", "truncate", "skip"]


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """Fine-tuning (finetune_llama.py)."""

    chat_template: str | None = None
    """File with the Jinja template that turns a conversation into text. Default: the tokenizer's own, else a plain
    one."""

    max_document_mb: int = 256
    """Largest size in MiB of one conversation: a line of a JSON-lines file or an entry of a JSON array. Memory must
    hold the longest several times."""

    group_by_length: bool = False
    """Pack conversations with others of similar length, and run each step at the length of its own sequences: half of
    --seq-length, a quarter, and so on, down to a 64th. Evaluations keep --seq-length."""

    long_samples: LongSamples = "error"
    """Handling of a conversation longer than --seq-length: refuse the run (error), cut the conversation off there
    (truncate), or leave it out (skip)."""
