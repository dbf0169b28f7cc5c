import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from megatron.tokenizer import TokenizerError, build_tokenizer
from megatron.tokenizer.gpt2_bpe import MAX_REMEMBERED_CHARACTERS, PIECE, SETTLED, GPT2BPETokenizer
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


NASTY_TEXTS = [
    "It's they'll We'RE 'ſ x'll's ''",
    "e\u0301 \u0301a \u20dd1 ก็ नि",
    "١٢٣ १२३ ½ Ⅷ ² 12½34 𝟙𝟚",
    "👩\u200d👩\u200d👧 🇩🇪❤\ufe0f a🤖b",
    "漢字かな、カ\u3099 한국어\u1112\u1161 ｶﾞ",
    "a\u00a0b \u00a0\u2028\u2029x\u0085\u200b\u3000 \u1680y\x1c\x1d z",
    "a\ud83e\udd16b\ud800c \udfff",
    "\u088f\u0558\U00031350\U0010ffff",
    " " * 5 + "a" + " " * 5 + "\n \t\r\n",
    "x" * (MAX_REMEMBERED_CHARACTERS + 1) + " x" * 3,
]


@pytest.mark.parametrize("text", NASTY_TEXTS, ids=range(len(NASTY_TEXTS)))
def test_nasty_unicode_gets_the_librarys_ids_at_the_first_and_second_encoding(
    bpe_files: tuple[Path, Path], text: str
) -> None:
    library = tokenizers.ByteLevelBPETokenizer(*map(str, bpe_files))
    tokenizer = GPT2BPETokenizer(*bpe_files)
    expected = library.encode(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")).ids
    assert [tokenizer.tokenize(text) for _ in range(2)] == [expected, expected]


def test_every_settled_character_is_split_as_the_library_splits_it() -> None:
    library = pre_tokenizers.Split(tokenizers.Regex(PIECE.pattern), "isolated")
    settled = [chr(code) for code in range(0x110000) if SETTLED.fullmatch(chr(code)) and not 0xD800 <= code < 0xE000]
    for start in range(0, len(settled), 1000):
        text = "".join(f"a{character}1{character}, {character} " for character in settled[start : start + 1000])
        assert PIECE.findall(text) == [piece for piece, _ in library.pre_tokenize_str(text)]


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


def assert_refused(files: tuple[Path, Path], words: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        GPT2BPETokenizer(*files)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert all(str(file) in message for file in files)


@pytest.mark.parametrize("num_bytes", range(len("#version: 0.2\nt h\nth e\nĠ the\na a".encode())))
def test_merges_truncated_anywhere_are_refused(bpe_files: tuple[Path, Path], num_bytes: int) -> None:
    bpe_files[1].write_bytes(bpe_files[1].read_bytes()[:num_bytes])
    assert_refused(bpe_files, "")


@pytest.mark.parametrize("num_bytes", range(2, 4000, 37))
def test_a_vocabulary_truncated_anywhere_is_refused(bpe_files: tuple[Path, Path], num_bytes: int) -> None:
    bpe_files[0].write_bytes(bpe_files[0].read_bytes()[:-num_bytes])
    assert_refused(bpe_files, "not a byte-level BPE")


@pytest.mark.parametrize(
    "merges, words",
    [
        ("#version: 0.2", "none of the 0 merges makes 'th' and 3 other tokens of the vocabulary"),
        ("t h\nth e\nĠ the", "none of the 3 merges makes 'aa' and 0 other tokens"),
        ("t h\nĠ the\nth e\na a", "merge 2 of 4, 'Ġ the', needs 'the', which none before it makes"),
        ("t h\nth e\nĠ the\nt h\na a", "merge 4 of 5, 't h', is there before"),
        ("t h\nth e\nĠ the\na a\na b", "not a byte-level BPE: "),
    ],
    ids=["none", "one left out", "another order", "one twice", "one too many"],
)
def test_merges_that_do_not_make_the_vocabulary_are_refused(
    bpe_files: tuple[Path, Path], merges: str, words: str
) -> None:
    bpe_files[1].write_text(f"{merges}\n")
    assert_refused(bpe_files, words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"<|endoftext|>": 259}, "the 261 tokens of the vocabulary do not have the ids 0 to 260, each once"),
        ({"<|endoftext|>": 400}, "do not have the ids 0 to 260, each once"),
        ({"left over": 261}, "none of the 4 merges makes 'left over' and 0 other tokens"),
    ],
    ids=["one id twice", "a hole", "an unmade token"],
)
def test_a_vocabulary_with_other_ids_or_tokens_is_refused(
    bpe_files: tuple[Path, Path], change: dict[str, int], words: str
) -> None:
    bpe_files[0].write_text(json.dumps(json.loads(bpe_files[0].read_text()) | change))
    assert_refused(bpe_files, words)


def test_special_tokens_need_no_merge_whatever_their_ids(bpe_files: tuple[Path, Path]) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<file_sep>", "[PAD]"]
    vocab = [token for token in json.loads(bpe_files[0].read_text()) if token not in special]
    bpe_files[0].write_text(json.dumps({token: number for number, token in enumerate([*special, *vocab])}))
    tokenizer = GPT2BPETokenizer(*bpe_files)
    assert (tokenizer.vocab_size, tokenizer.eod) == (264, 0)
