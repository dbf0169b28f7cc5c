"""Tokenizer protocol, and construction of a tokenizer from --tokenizer-type and its files."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, get_args

from megatron.config.tokenizer import TiktokenPattern, TokenizerConfig, TokenizerType
from megatron.tokenizer.errors import TokenizerError
from megatron.tokenizer.gpt2_bpe import GPT2BPETokenizer
from megatron.tokenizer.hugging_face import HFTokenizer
from megatron.tokenizer.null import NullTokenizer
from megatron.tokenizer.sentence_piece import SentencePieceTokenizer
from megatron.tokenizer.tiktoken_file import TikTokenizer

TOKENIZER_TYPES: tuple[str, ...] = get_args(TokenizerType)


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    """Number of ids, `eod` included."""

    eod: int
    """The id that ends a document."""

    def tokenize(self, text: str) -> list[int]:
        """Encode a text to ids, without `eod`."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""


def build_tokenizer(
    tokenizer_type: str,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
    tiktoken_pattern: TiktokenPattern | None = None,
) -> Tokenizer:
    """Build the tokenizer from the flags of the same names; TokenizerError if a flag is missing or wrong."""
    if tokenizer_type not in TOKENIZER_TYPES:
        allowed = ", ".join(TOKENIZER_TYPES)
        raise TokenizerError(f"--tokenizer-type ({tokenizer_type}) is unknown; use one of {allowed}.")
    if tokenizer_type == "GPT2BPETokenizer":
        return GPT2BPETokenizer(
            _existing(tokenizer_type, "--vocab-file", vocab_file, os.path.isfile),
            _existing(tokenizer_type, "--merge-file", merge_file, os.path.isfile),
        )
    if tokenizer_type in ("HFTokenizer", "HuggingFaceTokenizer"):
        return HFTokenizer(_existing(tokenizer_type, "--tokenizer-model", tokenizer_model, os.path.exists))
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise TokenizerError(f"NullTokenizer needs --vocab-size (got {vocab_size}) of 1 or more; add it.")
        return NullTokenizer(vocab_size)
    model_file = _existing(tokenizer_type, "--tokenizer-model", tokenizer_model, os.path.isfile)
    if tokenizer_type == "TikTokenizer":
        return TikTokenizer(model_file, tiktoken_pattern)
    return SentencePieceTokenizer(model_file)


def tokenizer_of(flags: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer from a group of flags; TokenizerError if a flag is missing or wrong."""
    return build_tokenizer(**vars(flags))


def tokenizer_settings_in(folder: Path) -> TokenizerConfig:
    """Return the settings of the tokenizer in the folder of --hf-model: that of tokenizer.json where there is one.

    TokenizerError if the folder has none.
    """
    sentence_piece, vocabulary, merges = (folder / name for name in ("tokenizer.model", "vocab.json", "merges.txt"))
    if (folder / "tokenizer.json").is_file():
        return TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(folder))
    if sentence_piece.is_file():
        return TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(sentence_piece))
    if vocabulary.is_file() and merges.is_file():
        return TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocabulary), merge_file=str(merges))
    files = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
    reason = f"has no tokenizer ({files})" if folder.is_dir() else "is no folder, and nothing is downloaded"
    raise TokenizerError(
        f"--hf-model ({folder}) {reason}; name a folder with the tokenizer of the model, or give one by "
        "--tokenizer-type and the flags of its files."
    )


def pad_vocab_size(vocab_size: int, make_divisible_by: int) -> int:
    """Round `vocab_size` up to a multiple of `make_divisible_by`: the number of rows of the embedding."""
    return -(-vocab_size // make_divisible_by) * make_divisible_by


def _existing(tokenizer_type: str, flag: str, value: str | None, exists: Callable[[Path], bool]) -> Path:
    if not value:
        raise TokenizerError(f"{tokenizer_type} needs {flag}, which is not given; add it.")
    path = Path(value)
    if not exists(path):
        raise TokenizerError(f"{flag} ({value}) does not exist or is of the wrong kind; give an existing path.")
    return path
