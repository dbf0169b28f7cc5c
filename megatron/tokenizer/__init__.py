"""Tokenizers: text to token ids and back."""

from megatron.tokenizer.errors import TokenizerError
from megatron.tokenizer.tokenizer import (
    TOKENIZER_TYPES,
    Tokenizer,
    build_tokenizer,
    pad_vocab_size,
    tokenizer_of,
    tokenizer_settings_in,
)

__all__ = [
    "TOKENIZER_TYPES",
    "Tokenizer",
    "TokenizerError",
    "build_tokenizer",
    "pad_vocab_size",
    "tokenizer_of",
    "tokenizer_settings_in",
]
