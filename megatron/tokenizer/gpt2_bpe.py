"""GPT-2's byte-level byte-pair encoding from vocab.json and merges.txt. Any text goes through unchanged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron.tokenizer.errors import TokenizerError
from megatron.tokenizer.text import encode_text

END_OF_DOCUMENT = "<|endoftext|>"


class GPT2BPETokenizer:
    """Byte-level BPE; <|endoftext|> ends a document, and is ordinary text where a document spells it out."""

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        try:
            vocab, merges = models.BPE.read_file(str(vocab_file), str(merge_file))
            self._tokenizer = byte_level_bpe(vocab, merges)
        except Exception as error:
            raise TokenizerError(
                f"--vocab-file ({vocab_file}) and --merge-file ({merge_file}) are not a byte-level BPE: {error}; give "
                "GPT-2's vocab.json and merges.txt, or make a pair with tools/train_tokenizer.py."
            ) from error
        # The library drops bytes it has no token for without a word.
        missing = sorted({END_OF_DOCUMENT, *pre_tokenizers.ByteLevel.alphabet()} - vocab.keys())
        if missing:
            raise TokenizerError(
                f"--vocab-file ({vocab_file}) lacks {len(missing)} tokens, {missing[0]!r} among them; it must hold all "
                f"256 bytes and {END_OF_DOCUMENT}; give GPT-2's vocab.json or make one with tools/train_tokenizer.py."
            )
        self.vocab_size = max(vocab.values()) + 1
        self.eod = vocab[END_OF_DOCUMENT]

    def tokenize(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def byte_level_bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer as the library has it, without special tokens. Raises Exception, as the library does."""
    tokenizer = tokenizers.Tokenizer(models.BPE(dict(vocab), list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
