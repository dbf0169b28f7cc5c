"""Small tokenizers on disk, trained when asked for."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import pre_tokenizers

HARD_TEXTS = [
    "",
    " ",
    "plain English, it's fine.",
    "  leading, trailing and\t\ttabs \n\r\n\n ",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 and a lone \N{VARIATION SELECTOR-16}",
    "漢字かな交じり文 한국어 ไทย עברית العربية",
    "\x00\x01\x1b[31m\x7f\u200b\u2028\ufeff\uffff\U0010ffff",
    "combining e\u0301 and composed \xe9",
    "a" * 100_000,
    " " * 10_000 + "\n" * 10_000,
    "🤖" * 5_000,
    "<|endoftext|> spelt out",
    "#version: 0.2\nĠ Ċ ▁",
]


@pytest.fixture
def bpe_files(tmp_path: Path) -> tuple[Path, Path]:
    """Write vocab.json and merges.txt of 256 bytes and four merges, with <|endoftext|> last."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "a")]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), "<|endoftext|>"]
    vocab, merge = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({symbol: k for k, symbol in enumerate(symbols)}))
    merge.write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return vocab, merge


@pytest.fixture
def sentencepiece_file(tmp_path: Path) -> Path:
    """Train a SentencePiece model that keeps text as it is and falls back to bytes."""
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a dog and a cat"] * 10),
            model_writer=file,
            vocab_size=300,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path
