"""Settings for the tokenizer that the data was tokenized with."""

from dataclasses import dataclass
from typing import Literal

TokenizerType = Literal[
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "HFTokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "NullTokenizer",
]
TiktokenPattern = Literal["llama3", "gpt4", "gpt4o"]


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
    """Model file of SentencePieceTokenizer or TikTokenizer; tokenizer.json, or its folder, of HFTokenizer."""

    tiktoken_pattern: TiktokenPattern | None = None
    """Model family whose pre-tokenization pattern and special tokens TikTokenizer uses. Default: the family that
    published a file with this number of tokens."""

    vocab_size: int | None = None
    """Number of token ids of NullTokenizer, not counting end-of-document."""
