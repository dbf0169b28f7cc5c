"""How conversations become samples."""

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
    """MiB that a line of a file of conversations, or an entry of a file that is one JSON array, may have; memory must
    hold the longest several times."""

    long_samples: LongSamples = "error"
    """What becomes of a conversation longer than --seq-length: the run is refused, or it is cut off there, or left
    out."""
