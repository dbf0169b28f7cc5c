"""Which tokenizer the data was made with."""

from dataclasses import dataclass
from typing import Literal

TokenizerType = Literal[
    "GPT2BPETokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "HFTokenizer", "NullTokenizer"
]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer."""

    tokenizer_type: TokenizerType = "GPT2BPETokenizer"
    """Kind of tokenizer."""

    vocab_file: str | None = None
    """vocab.json of GPT2BPETokenizer."""

    merge_file: str | None = None
    """merges.txt of GPT2BPETokenizer."""

    tokenizer_model: str | None = None
    """Model file of SentencePieceTokenizer; tokenizer.json, or the folder that holds it, of HFTokenizer."""

    vocab_size: int | None = None
    """Number of token ids of NullTokenizer, end-of-document not counted."""
