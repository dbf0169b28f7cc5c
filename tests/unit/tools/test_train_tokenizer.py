import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron.data.indexed_dataset import IndexedDataset
from megatron.tokenizer import build_tokenizer
from tests.unit.tokenizer.conftest import HARD_TEXTS, random_texts
from tests.unit.tools.tool import run_tool


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = ["the cat sat on the mat\n", "the dog saw the cat <|endoftext|>", "naïve café 漢字", "odd \ud800"]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    return path


def test_the_files_serve_as_a_gpt2_tokenizer_and_lose_no_text(tmp_path: Path, corpus: Path) -> None:
    arguments = ("--input", corpus, "--vocab-size", 280, "--output-dir", tmp_path / "tokenizer")
    assert run_tool("train_tokenizer", *arguments) == 0
    vocab_file, merge_file = tmp_path / "tokenizer" / "vocab.json", tmp_path / "tokenizer" / "merges.txt"
    tokenizer = build_tokenizer("GPT2BPETokenizer", str(vocab_file), str(merge_file))
    assert (tokenizer.vocab_size, tokenizer.eod) == (280, 279)
    assert len(merge_file.read_text(encoding="utf-8").splitlines()) == 1 + 280 - 257
    assert len(tokenizer.tokenize("the cat")) == 2
    for text in HARD_TEXTS:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_transformers_and_hftokenizer_read_the_same_tokenizer(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "tokenizer"
    assert run_tool("train_tokenizer", "--input", corpus, "--vocab-size", 280, "--output-dir", folder) == 0
    gpt2 = build_tokenizer("GPT2BPETokenizer", str(folder / "vocab.json"), str(folder / "merges.txt"))
    hf = build_tokenizer("HFTokenizer", tokenizer_model=str(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (hf.vocab_size, hf.eod) == (len(theirs), theirs.eos_token_id) == (280, 279)
    for text in [*HARD_TEXTS, *random_texts(seed=3)]:
        assert hf.tokenize(text) == gpt2.tokenize(text)
        plain = text.replace(theirs.eos_token, "")  # which transformers reads as the id
        assert theirs(plain) == {"input_ids": hf.tokenize(plain), "attention_mask": [1] * len(hf.tokenize(plain))}
        assert theirs.decode(hf.tokenize(plain)) == plain


SENTENCEPIECE = ("--tokenizer-type", "SentencePieceTokenizer")


def test_a_sentencepiece_model_loses_no_text_but_the_mark_for_a_space(tmp_path: Path, corpus: Path) -> None:
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "long " * 10_000 + "\n"}) + "\n")  # longer than the library takes at once
    arguments = ("--input", corpus, "--vocab-size", 310, "--output-dir", tmp_path / "tokenizer", *SENTENCEPIECE)
    assert run_tool("train_tokenizer", *arguments) == 0
    model_file = tmp_path / "tokenizer" / "tokenizer.model"
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=str(model_file))
    assert (tokenizer.vocab_size, tokenizer.eod) == (310, 1)
    assert len(tokenizer.tokenize("the cat long long")) == 4
    for text in [*HARD_TEXTS, *random_texts(seed=9)]:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text.replace("▁", " ")


FILES = {
    "GPT2BPETokenizer": {"vocab.json": "--vocab-file", "merges.txt": "--merge-file"},
    "SentencePieceTokenizer": {"tokenizer.model": "--tokenizer-model"},
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("input_format", ["jsonl", "text"])
def test_preprocess_data_takes_what_was_trained(tmp_path: Path, corpus: Path, kind: str, input_format: str) -> None:
    source = ("--input", corpus, "--input-format", input_format)
    arguments = ("--vocab-size", 300, "--output-dir", tmp_path / "tokenizer", "--tokenizer-type", kind)
    assert run_tool("train_tokenizer", *source, *arguments) == 0
    flags = [word for name, flag in FILES[kind].items() for word in (flag, tmp_path / "tokenizer" / name)]
    output = ("--output-prefix", tmp_path / "data", "--append-eod", "--tokenizer-type", kind)
    assert run_tool("preprocess_data", *source, *output, *flags) == 0
    dataset = IndexedDataset(tmp_path / "data_text_document")
    tokenizer = build_tokenizer(
        kind, **{flag[2:].replace("-", "_"): str(path) for flag, path in zip(flags[::2], flags[1::2], strict=True)}
    )
    text = corpus.read_text() if input_format == "text" else "the cat sat on the mat\n"
    first = dataset.get_document(0).tolist()
    assert first[-1] == tokenizer.eod
    assert tokenizer.detokenize(first[:-1]) == text


def test_settings_of_the_other_kind_and_text_that_is_not_enough_are_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--input", corpus, "--output-dir", tmp_path / "tokenizer", *SENTENCEPIECE)
    with pytest.raises(SystemExit):
        run_tool("train_tokenizer", *arguments, "--vocab-size", 300, "--min-frequency", 3)
    assert "--min-frequency (3) has no effect with SentencePieceTokenizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_tool("train_tokenizer", *arguments, "--vocab-size", 257)
    assert "--vocab-size (257) must be 258 or more, the 256 bytes and <unk> and </s>" in capsys.readouterr().err
    assert run_tool("train_tokenizer", *arguments, "--vocab-size", 260) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: SentencePiece cannot learn a --vocab-size (260) from the input: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize(
    "kind, names",
    [
        ("GPT2BPETokenizer", ("vocab.json", "merges.txt", "tokenizer.json")),
        ("SentencePieceTokenizer", ("tokenizer.model",)),
    ],
)
def test_the_same_text_gives_the_same_tokenizer(
    tmp_path: Path, corpus: Path, kind: str, names: tuple[str, ...]
) -> None:
    for name in ("one", "two"):
        arguments = ("--vocab-size", 300, "--output-dir", tmp_path / name, "--tokenizer-type", kind)
        assert run_tool("train_tokenizer", "--input", corpus, *arguments) == 0
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_vocabulary_too_small_for_the_bytes_is_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_tool("train_tokenizer", "--input", corpus, "--vocab-size", 256, "--output-dir", tmp_path)
    assert exit_.value.code == 2
    assert "--vocab-size (256) must be 257 or more" in capsys.readouterr().err


def test_a_short_text_gives_a_smaller_vocabulary_and_says_so(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("train_tokenizer", "--input", corpus, "--vocab-size", 5000, "--output-dir", tmp_path) == 0
    assert "no pairs left to merge" in capsys.readouterr().err


def test_missing_input_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--input", tmp_path / "nowhere", "--vocab-size", 300, "--output-dir", tmp_path / "tokenizer")
    assert run_tool("train_tokenizer", *arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "tokenizer").exists()
