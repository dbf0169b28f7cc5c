import random

import pytest

from megatron.tokenizer import TokenizerError
from megatron.tokenizer.null import NullTokenizer


def test_ids_are_read_from_text_and_written_as_text() -> None:
    tokenizer = NullTokenizer(100)
    assert tokenizer.tokenize(" 3 14\n99 ") == [3, 14, 99]
    assert tokenizer.detokenize([3, 14, 99]) == "3 14 99"
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)


@pytest.mark.parametrize("word", ["101", "-1", "x", "²", "1.5"])
def test_what_is_no_id_of_the_vocabulary_is_refused(word: str) -> None:
    with pytest.raises(TokenizerError, match="it takes ids 0 to 100 separated by spaces"):
        NullTokenizer(100).tokenize(f"1 {word}")


def test_ids_that_a_dataset_cannot_hold_are_refused() -> None:
    assert NullTokenizer(2**31 - 1).eod == 2**31 - 1
    with pytest.raises(TokenizerError, match="got --vocab-size 2147483648, and ids of 32 bits end at 2147483647"):
        NullTokenizer(2**31)


def test_ids_written_as_text_come_back_unchanged() -> None:
    tokenizer, source = NullTokenizer(50_000), random.Random(1)
    ids = [source.randrange(tokenizer.vocab_size) for _ in range(100_000)]
    assert tokenizer.tokenize(tokenizer.detokenize(ids)) == ids
