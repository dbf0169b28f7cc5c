from pathlib import Path

import pytest
import sentencepiece

from megatron.tokenizer import TokenizerError, build_tokenizer
from megatron.tokenizer.sentence_piece import SentencePieceTokenizer
from tests.unit.tokenizer.conftest import HARD_TEXTS, random_texts

SPACE = "▁"  # how the library writes a space


def train(path: Path, **settings: object) -> Path:
    """Write a model with the library's own defaults but for `settings`."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a dog and a cat"] * 10),
            model_writer=file,
            vocab_size=300,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
    return path


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_text_comes_back_unchanged_from_a_model_without_normalization(sentencepiece_file: Path, text: str) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_file)
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text.replace(SPACE, " ")
    assert all(0 <= k < tokenizer.vocab_size for k in ids)
    assert tokenizer.eod not in ids


def test_random_texts_come_back_with_the_mark_for_a_space_as_one(sentencepiece_file: Path) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_file)
    for text in random_texts(seed=5):
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text.replace(SPACE, " ")
        assert tokenizer.eod not in ids


def test_ids_are_those_of_the_library(sentencepiece_file: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = SentencePieceTokenizer(sentencepiece_file)
    for text in random_texts(seed=6):
        assert tokenizer.tokenize(text) == library.encode(text, out_type=int)


@pytest.mark.parametrize(
    "text, lost", [("  two  spaces ", "two spaces"), ("ﬁne ½ Ａ", "fine 1⁄2 A"), ("line\r\nend\t.", "line end .")]
)
def test_the_librarys_default_normalization_loses_spaces_line_ends_and_forms(
    tmp_path: Path, text: str, lost: str
) -> None:
    tokenizer = SentencePieceTokenizer(train(tmp_path / "nfkc.model", byte_fallback=True))
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == lost


def test_an_end_of_document_that_a_text_can_spell_is_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "spelt.model", eos_id=-1, user_defined_symbols=["<eod>"])
    with pytest.raises(TokenizerError, match=r"no end-of-sentence piece and none of <eod>, .* that is a control piece"):
        SentencePieceTokenizer(path)
    path = train(tmp_path / "control.model", eos_id=-1, control_symbols=["<eod>"])
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer.eod not in tokenizer.tokenize("a<eod>")


def test_the_end_of_sentence_piece_ends_a_document(sentencepiece_file: Path) -> None:
    for name in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer"):
        assert build_tokenizer(name, tokenizer_model=str(sentencepiece_file)).eod == 2


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model\) is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_truncated_anywhere_is_refused(tmp_path: Path, model_type: str) -> None:
    path = train(tmp_path / "tokenizer.model", model_type=model_type, normalization_rule_name="identity")
    whole = path.read_bytes()
    for num_bytes in range(len(whole)):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(TokenizerError, match=r"\.model\) (ends before|is not a SentencePiece)"):
            SentencePieceTokenizer(path)
    path.write_bytes(whole)
    assert SentencePieceTokenizer(path).vocab_size > 3
