"""GPT-2's byte-level byte-pair encoding from vocab.json and merges.txt. Any text survives a round trip unchanged.

Neither file has a checksum, but each determines much of the other. Every token is a byte, a special token, or the
result of a merge of two earlier tokens, and every merge makes a token. So a truncated file is detected, and so is a
file of another pair.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import regex
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron.tokenizer.errors import TokenizerError
from megatron.tokenizer.text import encode_text, valid_unicode

END_OF_DOCUMENT = "<|endoftext|>"
SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]", re.DOTALL)
# GPT-2's pattern: the pieces of a text whose bytes may be merged.
PIECE = regex.compile(r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# Blocks of Unicode without unassigned characters: every version splits them alike. Latin, Cyrillic, punctuation, arrows
# and mathematical signs, kana, Han, Hangul, emoji.
SETTLED = regex.compile(
    r"[\0-\u0377\u0400-\u052f\u1e00-\u1eff\u2000-\u2064\u2190-\u23ff\u2500-\u27ff\u3000-\u303f\u3041-\u3096"
    r"\u3099-\u30ff\u4e00-\u9fff\uac00-\ud7a3\ufe00-\ufe0f\uff01-\uffbe\U0001f300-\U0001f64f]*+"
)
MAX_REMEMBERED_PIECES = 1 << 18
MAX_REMEMBERED_CHARACTERS = 32


class GPT2BPETokenizer:
    """Byte-level BPE; <|endoftext|> ends a document, and is ordinary text if a document spells it out."""

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        try:
            vocab, merges = models.BPE.read_file(str(vocab_file), str(merge_file))
            self._tokenizer = byte_level_bpe(vocab, merges)
        except Exception as error:
            raise TokenizerError(
                f"--vocab-file ({vocab_file}) and --merge-file ({merge_file}) are not a byte-level BPE: {error}; give "
                "GPT-2's vocab.json and merges.txt, or make a pair with tools/train_tokenizer.py."
            ) from error
        # The library silently drops bytes for which it has no token.
        missing = sorted({END_OF_DOCUMENT, *pre_tokenizers.ByteLevel.alphabet()} - vocab.keys())
        if missing:
            raise TokenizerError(
                f"--vocab-file ({vocab_file}) lacks {len(missing)} tokens, {missing[0]!r} among them; it must hold all "
                f"256 bytes and {END_OF_DOCUMENT}; give GPT-2's vocab.json or make one with tools/train_tokenizer.py."
            )
        fault = find_fault(vocab, merges)
        if fault is not None:
            raise TokenizerError(
                f"--merge-file ({merge_file}) does not go with --vocab-file ({vocab_file}): {fault}; fetch both files "
                "again; for a vocabulary with other special tokens than <..> and [..] use HFTokenizer."
            )
        self.vocab_size = len(vocab)
        self.eod = vocab[END_OF_DOCUMENT]
        self._ids: dict[str, list[int]] = {}

    def tokenize(self, text: str) -> list[int]:
        """Split the text and look its pieces up, in half of the library's time; the ids are the library's."""
        text = valid_unicode(text)
        if SETTLED.fullmatch(text) is None:
            return encode_text(self._tokenizer, text)
        ids: list[int] = []
        for match in PIECE.finditer(text):
            piece = match[0]
            ids += self._ids.get(piece) or self._encode_piece(piece)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _encode_piece(self, piece: str) -> list[int]:
        ids = encode_text(self._tokenizer, piece)
        if len(piece) <= MAX_REMEMBERED_CHARACTERS and len(self._ids) < MAX_REMEMBERED_PIECES:
            self._ids[piece] = ids
        return ids


def find_fault(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> str | None:
    """Return why a vocabulary and its merges do not fit each other; None if no fault is found."""
    if sorted(vocab.values()) != list(range(len(vocab))):
        return f"the {len(vocab)} tokens of the vocabulary do not have the ids 0 to {len(vocab) - 1}, each once"
    made = set(pre_tokenizers.ByteLevel.alphabet())
    seen: set[tuple[str, str]] = set()
    for number, pair in enumerate(merges, start=1):
        unmade = [part for part in pair if part not in made]
        if unmade or pair in seen:
            reason = "is there before" if pair in seen else f"needs {unmade[0]!r}, which none before it makes"
            return f"merge {number} of {len(merges)}, {' '.join(pair)!r}, {reason}"
        seen.add(pair)
        made.add("".join(pair))
    unmade = [token for token in sorted(vocab, key=vocab.__getitem__) if token not in made]
    unmade = [token for token in unmade if not SPECIAL_TOKEN.fullmatch(token)]
    if unmade:
        return (
            f"none of the {len(merges)} merges makes {unmade[0]!r} and {len(unmade) - 1} other tokens of the vocabulary"
        )
    return None


def byte_level_bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Build the library's GPT-2 tokenizer, without special tokens. Raises Exception, as the library does."""
    tokenizer = tokenizers.Tokenizer(models.BPE(dict(vocab), list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
