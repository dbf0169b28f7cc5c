"""Token ids written as text, for data that is already numbers and for trials without a vocabulary."""

from collections.abc import Sequence

from megatron.tokenizer.errors import TokenizerError

LARGEST_ID = 2**31 - 1  # of a dataset's int32


class NullTokenizer:
    """Text such as "3 14 15" stands for ids 0 to vocab_size - 1; one more id, `eod`, ends a document."""

    def __init__(self, vocab_size: int) -> None:
        if vocab_size > LARGEST_ID:
            raise TokenizerError(
                f"NullTokenizer got --vocab-size {vocab_size}, and ids of 32 bits end at {LARGEST_ID}; use no more."
            )
        self.vocab_size = vocab_size + 1
        self.eod = vocab_size

    def tokenize(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            if not word.isdecimal() or int(word) >= self.vocab_size:
                raise TokenizerError(
                    f"NullTokenizer got {word!r}; it takes ids 0 to {self.vocab_size - 1} separated by spaces; use "
                    "another --tokenizer-type for text, or a larger --vocab-size."
                )
            ids.append(int(word))
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)
