import pytest

from megatron.data.indexed_dataset import smallest_dtype
from megatron.tokenizer import TOKENIZER_TYPES, TokenizerError, build_tokenizer, pad_vocab_size


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(TokenizerError, match=r"--tokenizer-type \(Bert\) is unknown; use one of GPT2BPE.*Null"):
        build_tokenizer("Bert")


@pytest.mark.parametrize("tokenizer_type", TOKENIZER_TYPES)
def test_a_type_without_its_flags_names_the_missing_one(tokenizer_type: str) -> None:
    with pytest.raises(TokenizerError, match=rf"{tokenizer_type} needs --(vocab-file|tokenizer-model|vocab-size)"):
        build_tokenizer(tokenizer_type)


@pytest.mark.parametrize("tokenizer_type", TOKENIZER_TYPES[:-1])
def test_a_missing_file_is_named(tokenizer_type: str) -> None:
    with pytest.raises(TokenizerError, match=r"--(vocab-file|tokenizer-model) \(/nowhere/x\) does not exist"):
        build_tokenizer(tokenizer_type, "/nowhere/x", "/nowhere/x", "/nowhere/x")


@pytest.mark.parametrize("size, divisor, padded", [(50257, 128, 50304), (128, 128, 128), (1, 128, 128), (7, 1, 7)])
def test_the_vocabulary_is_padded_to_the_next_multiple(size: int, divisor: int, padded: int) -> None:
    assert pad_vocab_size(size, divisor) == padded


@pytest.mark.parametrize("vocab_size, dtype", [(65498, "uint16"), (65499, "int32")])
def test_the_vocabulary_decides_the_type_of_the_stored_tokens(vocab_size: int, dtype: str) -> None:
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=vocab_size)  # and one id for the end of a document
    assert smallest_dtype(tokenizer.vocab_size) == dtype
