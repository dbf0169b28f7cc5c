import json
from pathlib import Path

import pytest
import tokenizers

from megatron.tokenizer import TokenizerError, build_tokenizer
from megatron.tokenizer.gpt2_bpe import GPT2BPETokenizer
from tests.unit.tokenizer.conftest import HARD_TEXTS, random_texts


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_any_text_comes_back_unchanged(bpe_files: tuple[Path, Path], text: str) -> None:
    tokenizer = GPT2BPETokenizer(*bpe_files)
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.eod not in ids


def test_random_texts_come_back_unchanged(bpe_files: tuple[Path, Path]) -> None:
    tokenizer = GPT2BPETokenizer(*bpe_files)
    for text in random_texts(seed=1):
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert tokenizer.eod not in ids


def test_ids_are_those_of_the_librarys_own_byte_level_bpe(bpe_files: tuple[Path, Path]) -> None:
    library = tokenizers.ByteLevelBPETokenizer(*map(str, bpe_files))
    tokenizer = GPT2BPETokenizer(*bpe_files)
    for text in [*HARD_TEXTS, *random_texts(seed=2)]:
        assert tokenizer.tokenize(text) == library.encode(text).ids


def test_merges_are_applied(bpe_files: tuple[Path, Path]) -> None:
    tokenizer = GPT2BPETokenizer(*bpe_files)
    assert [tokenizer.detokenize([k]) for k in tokenizer.tokenize("the theaa")] == ["the", " the", "aa"]


def test_the_end_of_document_is_the_last_id(bpe_files: tuple[Path, Path]) -> None:
    tokenizer = GPT2BPETokenizer(*bpe_files)
    assert (tokenizer.vocab_size, tokenizer.eod) == (261, 260)
    assert tokenizer.detokenize([260]) == "<|endoftext|>"


def test_surrogates_that_json_can_spell_are_joined_or_replaced(bpe_files: tuple[Path, Path]) -> None:
    tokenizer = GPT2BPETokenizer(*bpe_files)
    assert tokenizer.detokenize(tokenizer.tokenize("a\ud83e\udd16b\ud800c")) == "a🤖b\ufffdc"


@pytest.mark.parametrize("symbol", ["<|endoftext|>", "Ġ"])
def test_a_vocabulary_that_would_lose_text_is_refused(bpe_files: tuple[Path, Path], symbol: str) -> None:
    vocab = json.loads(bpe_files[0].read_text())
    del vocab[symbol]
    bpe_files[0].write_text(json.dumps(vocab))
    bpe_files[1].write_text("")
    with pytest.raises(TokenizerError, match=r"vocab\.json\) lacks 1 tokens, .* all 256 bytes"):
        GPT2BPETokenizer(*bpe_files)


def test_a_broken_vocabulary_is_named(bpe_files: tuple[Path, Path]) -> None:
    bpe_files[0].write_text("{")
    with pytest.raises(TokenizerError, match=r"vocab\.json\) and --merge-file \(.*\) are not a byte-level BPE"):
        build_tokenizer("GPT2BPETokenizer", *map(str, bpe_files))
