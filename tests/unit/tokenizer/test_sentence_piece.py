from pathlib import Path

import pytest

from megatron.tokenizer import TokenizerError, build_tokenizer
from megatron.tokenizer.sentence_piece import SentencePieceTokenizer

TEXTS = ["the cat", "  two  spaces ", "漢字 👩‍👧 \x01", "a" * 20_000, ""]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_comes_back_unchanged_from_a_model_that_does_not_normalise(sentencepiece_file: Path, text: str) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_file)
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert all(0 <= k < tokenizer.vocab_size for k in ids)


def test_the_end_of_sentence_piece_ends_a_document(sentencepiece_file: Path) -> None:
    for name in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer"):
        assert build_tokenizer(name, tokenizer_model=str(sentencepiece_file)).eod == 2


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model\) is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")
