"""tiktoken files, as published for Llama 3 and by OpenAI: one line per token, its bytes in base64 and its rank.

Such a file holds neither the pattern that splits a text before its bytes are merged, nor the special tokens. Both
belong to a family of models. `--tiktoken-pattern` names the family; a published file is recognized by its token count.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import regex

from megatron.tokenizer.errors import TokenizerError
from megatron.tokenizer.text import valid_unicode

# tiktoken's own engine for patterns fails on a run of whitespace of nearly a million characters.
LONG_WHITESPACE = regex.compile(r"(?<!\s)\s{500000}")


@dataclass(frozen=True)
class Family:
    """The split pattern of a family of models, and its special tokens, whose ids follow those of the file."""

    pattern: str
    num_ranks: int
    """Number of tokens in the published file."""

    special_tokens: dict[int, str]
    """Special tokens, by their distance from the end of the file's ids."""

    end_of_document: str


def _llama3_special_tokens() -> dict[int, str]:
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    free = [place for place in range(256) if place not in named]
    return named | {place: f"<|reserved_special_token_{k}|>" for k, place in enumerate(free)}


_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)

FAMILIES = {
    "llama3": Family(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        128000,
        _llama3_special_tokens(),
        "<|end_of_text|>",
    ),
    "gpt4": Family(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s",
        100256,
        {1: "<|endoftext|>", 2: "<|fim_prefix|>", 3: "<|fim_middle|>", 4: "<|fim_suffix|>", 20: "<|endofprompt|>"},
        "<|endoftext|>",
    ),
    "gpt4o": Family(
        "|".join((*_CASED_WORDS, r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")),
        199998,
        {1: "<|endoftext|>", 20: "<|endofprompt|>"},
        "<|endoftext|>",
    ),
}


class TikTokenizer:
    """Byte-level BPE of a tiktoken file. Special tokens that a text spells out are ordinary text."""

    def __init__(self, model_file: Path, pattern: str | None = None) -> None:
        """Read the file, without the network or the library's cache. `pattern`: a key of FAMILIES."""
        try:
            import tiktoken
        except ImportError as error:
            raise TokenizerError(
                "TikTokenizer needs the package tiktoken, which is not installed; run: pip install tiktoken"
            ) from error
        ranks = read_ranks(model_file)
        family = _choose_family(model_file, len(ranks), pattern)
        first = max(ranks.values()) + 1
        special_tokens = {token: first + place for place, token in family.special_tokens.items()}
        self._encoding = tiktoken.Encoding(
            model_file.name, pat_str=family.pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )
        self._pattern = regex.compile(family.pattern)
        self.vocab_size = max(special_tokens.values()) + 1
        self.eod = special_tokens[family.end_of_document]

    def tokenize(self, text: str) -> list[int]:
        text = valid_unicode(text)
        if LONG_WHITESPACE.search(text) is None:
            return self._encoding.encode_ordinary(text)
        encode = self._encoding._encode_single_piece
        return [token for match in self._pattern.finditer(text) for token in encode(match[0])]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the tokens of a tiktoken file and their ranks, which are their ids. Raises TokenizerError."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"--tokenizer-model ({path}) is not a tiktoken file: line {number} is not a token in base64 and its "
                "rank; give Llama 3's original/tokenizer.model or a .tiktoken file, or choose another --tokenizer-type."
            ) from error
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        fault = f"lacks {missing} of the 256 bytes" if missing else "does not give each rank from 0 on to one token"
        raise TokenizerError(f"--tokenizer-model ({path}) {fault}; the file is damaged, fetch it again.")
    return ranks


def _choose_family(path: Path, num_ranks: int, pattern: str | None) -> Family:
    if pattern is not None:
        return FAMILIES[pattern]
    for family in FAMILIES.values():
        if family.num_ranks == num_ranks:
            return family
    raise TokenizerError(
        f"--tokenizer-model ({path}) has {num_ranks} tokens, as many as no published file, so that it does not say how "
        f"text is split; add --tiktoken-pattern, one of {', '.join(FAMILIES)}."
    )
