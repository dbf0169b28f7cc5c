"""Small tokenizers on disk, trained when asked for."""

import json
import random
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
    "</s><s><unk><pad><|end_of_text|><|begin_of_text|><|im_end|><eod>",
    "mixed \r\n line \n\r ends \r\r\n",
    "שלום \u202bright\u202c to left \u200f مرحبا 123",
    "z" + "\u0300\u0301\u0302" * 1_000,
    "one very long line of words, " * 10_000,
    " " * 100_000 + "!",
    "#version: 0.2\nĠ Ċ ▁",
]

FRAGMENTS = [
    *("\0", "\r\n", "\n", "\r", "\t", " ", "   ", "\u00a0", "\u3000", "\u0085", "\u2028", "\u200d", "\ufe0f", "\ufeff"),
    *("a", "A", "the", "They'LL", "0", "12345", "_", "==", "</s>", "<|endoftext|>", "e\u0301", "\u0301", "ß", "ǅ", "ﬁ"),
    *(
        "漢字",
        "カ\u3099",
        "한",
        "\u1112\u1161",
        "ไทย",
        "שָׁ",
        "لا",
        "\u202e",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "\U0010ffff",
        "Ġ",
        "▁",
    ),
]


def random_texts(seed: int, number: int = 300) -> list[str]:
    """Return texts of 1 to 40 pieces each, most of them awkward, some repeated."""
    source = random.Random(seed)
    return [
        "".join(source.choice(FRAGMENTS) * source.choice((1, 1, 1, 2, 7)) for _ in range(source.randint(1, 40)))
        for _ in range(number)
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
