"""tiktoken files: the ids are the library's, nothing is fetched or cached, and no text spells a special token."""

import base64
import socket
import sys
from pathlib import Path
from typing import get_args

import pytest
import tiktoken
import tiktoken_ext.openai_public

from megatron.config.tokenizer import TiktokenPattern
from megatron.tokenizer import TokenizerError, build_tokenizer
from megatron.tokenizer.tiktoken_file import FAMILIES, TikTokenizer, read_ranks
from tests.unit.tokenizer.conftest import HARD_TEXTS, random_texts

MERGES = [b"th", b"the", b" the", b"aa", b"aaaa", b"  ", b"    ", b"\r\n", b"\n\n", "é".encode(), b"'l", b"'ll"]
NUM_RANKS = 256 + len(MERGES)
PATTERNS = list(FAMILIES)


def lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(lines([*(bytes([k]) for k in range(256)), *MERGES]))
    return path


def test_the_patterns_are_those_of_the_flag() -> None:
    assert list(get_args(TiktokenPattern)) == PATTERNS


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_any_text_comes_back_unchanged(model_file: Path, text: str, pattern: str) -> None:
    tokenizer = TikTokenizer(model_file, pattern)
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert max(ids, default=0) < NUM_RANKS


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_texts_come_back_unchanged_with_the_librarys_ids(
    model_file: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # the library's own reader copies into a cache
    library = tiktoken.Encoding(
        "golden",
        pat_str=FAMILIES[pattern].pattern,
        mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(model_file)),
        special_tokens={},
    )
    tokenizer = TikTokenizer(model_file, pattern)
    for text in random_texts(seed=7):
        ids = tokenizer.tokenize(text)
        assert ids == library.encode(text, disallowed_special=())
        assert tokenizer.detokenize(ids) == text


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6, " " * 10**6 + "a", "\n \t" * 100_000 + "漢" * 10**5])
def test_runs_that_the_library_fails_on_come_back_unchanged(model_file: Path, text: str, pattern: str) -> None:
    tokenizer = TikTokenizer(model_file, pattern)
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "text", [" " * 600_000 + "a", "x" + "\n\t" * 300_000, "\x1c" * 600_000, "é1\u00a0" + " " * 600_000]
)
def test_long_whitespace_gets_the_ids_of_the_library_as_long_as_it_has_any(
    model_file: Path, text: str, pattern: str
) -> None:
    tokenizer = TikTokenizer(model_file, pattern)
    assert tokenizer.tokenize(text) == tokenizer._encoding.encode_ordinary(text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whitespace_that_the_library_fails_on_is_one_piece_per_match_of_the_pattern(
    model_file: Path, pattern: str
) -> None:
    tokenizer = TikTokenizer(model_file, pattern)
    spaces, (letter,) = tokenizer.tokenize(" " * 4_000_000), tokenizer.tokenize("a")
    four = NUM_RANKS - len(MERGES) + MERGES.index(b"    ")
    assert spaces == [four] * 1_000_000
    assert tokenizer.tokenize(" " * 4_000_001 + "a") == [*spaces, *tokenizer.tokenize(" "), letter]


def test_surrogates_that_json_can_spell_are_joined_or_replaced(model_file: Path) -> None:
    tokenizer = TikTokenizer(model_file, "llama3")
    assert tokenizer.detokenize(tokenizer.tokenize("a\ud83e\udd16b\ud800c")) == "a🤖b\ufffdc"


def test_the_special_tokens_of_llama3_are_at_their_places(model_file: Path) -> None:
    tokenizer = TikTokenizer(model_file, "llama3")
    assert tokenizer.eod == NUM_RANKS + 1  # 128001 after the 128000 of the published file
    assert tokenizer.vocab_size == NUM_RANKS + 256  # 128256
    spelt = {place: tokenizer.detokenize([NUM_RANKS + place]) for place in (0, 1, 2, 3, 4, 5, 9, 11, 255)}
    assert spelt == {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        2: "<|reserved_special_token_0|>",
        3: "<|reserved_special_token_1|>",
        4: "<|finetune_right_pad_id|>",
        5: "<|reserved_special_token_2|>",
        9: "<|eot_id|>",
        11: "<|reserved_special_token_3|>",
        255: "<|reserved_special_token_247|>",
    }


@pytest.mark.parametrize("pattern, encoding", [("gpt4", "cl100k_base"), ("gpt4o", "o200k_base")])
def test_openais_families_are_those_of_the_library(
    pattern: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    published = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[encoding]()
    family = FAMILIES[pattern]
    places = {token: family.num_ranks + place for place, token in family.special_tokens.items()}
    assert places == published["special_tokens"]
    library, ours = (
        tiktoken.Encoding("x", pat_str=each, mergeable_ranks={bytes([k]): k for k in range(256)}, special_tokens={})
        for each in (published["pat_str"], family.pattern)
    )
    for text in random_texts(seed=8):
        assert ours.encode_ordinary(text) == library.encode_ordinary(text)


def test_patterns_differ_where_the_models_do(model_file: Path) -> None:
    def pieces(pattern: str, text: str) -> list[int]:
        return TikTokenizer(model_file, pattern).tokenize(text)

    assert pieces("gpt4", "  \n  ") != pieces("llama3", "   \n  ")
    assert len(pieces("gpt4o", "xThe the")) <= len(pieces("llama3", "xThe the"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_special_tokens_that_a_text_spells_out_are_ordinary_text(model_file: Path, pattern: str) -> None:
    tokenizer = TikTokenizer(model_file, pattern)
    for token in FAMILIES[pattern].special_tokens.values():
        ids = tokenizer.tokenize(f"a{token}b")
        assert max(ids) < NUM_RANKS
        assert tokenizer.detokenize(ids) == f"a{token}b"


def test_a_published_file_says_its_family_by_its_size(model_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "llama3.model"
    whole.write_bytes(
        lines([*(bytes([k]) for k in range(256)), *(b"%d" % k for k in range(1000, 128000 - 256 + 1000))])
    )
    tokenizer = build_tokenizer("TikTokenizer", tokenizer_model=str(whole))
    assert (tokenizer.vocab_size, tokenizer.eod) == (128256, 128001)
    with pytest.raises(TokenizerError, match=r"has 268 tokens, as many as no published file.*llama3, gpt4, gpt4o"):
        build_tokenizer("TikTokenizer", tokenizer_model=str(model_file))


def test_nothing_is_fetched_and_a_changed_file_counts_at_once(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    before = TikTokenizer(model_file, "llama3")
    model_file.write_bytes(lines([*(bytes([k]) for k in range(256)), b"zz"]))
    after = TikTokenizer(model_file, "llama3")
    assert (len(before.tokenize("zz")), len(after.tokenize("zz"))) == (2, 1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"not a model\n", b"YQ== x\n", b"YQ==\n", b"\xff\xfe 0\n", b"Y!== 0\n"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model\) is not a tiktoken file: line 1 is not a token"):
        TikTokenizer(path)


def test_a_file_that_would_lose_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(lines([bytes([k]) for k in range(1, 256)]))
    with pytest.raises(TokenizerError, match="lacks 1 of the 256 bytes; the file is damaged"):
        read_ranks(path)
    # A rank cut short, two ranks of one token, and a line that is missing.
    for more in (b"YWE= 25", b"YWE= 256\nYWE= 257\n", b"YWE= 257\n"):
        path.write_bytes(lines([bytes([k]) for k in range(256)]) + more)
        with pytest.raises(TokenizerError, match="does not give each rank from 0 on to one token"):
            read_ranks(path)


def test_without_the_package_the_error_says_how_to_install_it(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match="which is not installed; run: pip install tiktoken"):
        TikTokenizer(model_file)
