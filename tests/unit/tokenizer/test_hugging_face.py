import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron.tokenizer import TokenizerError, build_tokenizer
from megatron.tokenizer.hugging_face import HFTokenizer
from tests.unit.tokenizer.conftest import HARD_TEXTS, random_texts


@pytest.fixture
def model_folder(tmp_path: Path, bpe_files: tuple[Path, Path]) -> Path:
    """Write a byte-level tokenizer.json with two special tokens, set to truncate texts to four tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(*map(str, bpe_files)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<stop>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_any_text_comes_back_unchanged_and_whole(model_folder: Path, text: str) -> None:
    tokenizer = HFTokenizer(model_folder)
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert not {260, 261, 262} & set(ids)


def test_random_texts_come_back_unchanged(model_folder: Path) -> None:
    tokenizer = HFTokenizer(model_folder)
    for text in random_texts(seed=3):
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert not {260, 261, 262} & set(ids)


def test_ids_are_those_of_the_library(model_folder: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    tokenizer = HFTokenizer(model_folder)
    for text in random_texts(seed=4):
        plain = text.replace("<", "(")  # the library reads special tokens in it
        assert tokenizer.tokenize(plain) == library.encode(plain, add_special_tokens=False).ids


def test_special_tokens_that_a_text_spells_out_are_ordinary_text(model_folder: Path) -> None:
    tokenizer = HFTokenizer(model_folder)
    ids = tokenizer.tokenize("a</s>b<stop>")
    assert not {tokenizer.eod, 262} & set(ids)
    assert [tokenizer.detokenize([k]) for k in ids] == list("a</s>b<stop>")


def test_a_vocabulary_in_which_a_text_spells_the_end_of_a_document_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="reads the text '</s>' as the end of a document, so that a document"):
        HFTokenizer(tmp_path)


def test_upstreams_other_name_is_the_same(model_folder: Path) -> None:
    assert isinstance(build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(model_folder)), HFTokenizer)


def test_the_file_serves_as_well_as_its_folder(model_folder: Path) -> None:
    assert HFTokenizer(model_folder / "tokenizer.json").vocab_size == HFTokenizer(model_folder).vocab_size == 263


@pytest.mark.parametrize("token", ["<stop>", {"content": "<stop>", "special": True}])
def test_the_configured_token_ends_a_document(model_folder: Path, token: object) -> None:
    (model_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert HFTokenizer(model_folder).eod == 262


def test_without_configuration_a_well_known_token_ends_a_document(model_folder: Path) -> None:
    assert HFTokenizer(model_folder).eod == 260


def test_a_configured_token_that_the_vocabulary_lacks_is_refused(model_folder: Path) -> None:
    (model_folder / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(TokenizerError, match="has no end-of-document token; looked for <nowhere>"):
        HFTokenizer(model_folder)


def test_a_folder_or_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"is a folder without tokenizer\.json"):
        HFTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"is not a tokenizer\.json"):
        HFTokenizer(tmp_path)


def test_a_file_truncated_anywhere_is_refused(model_folder: Path) -> None:
    path = model_folder / "tokenizer.json"
    whole = path.read_bytes().strip()
    for num_bytes in range(0, len(whole), 7):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(TokenizerError, match=r"tokenizer\.json\) is not a tokenizer\.json"):
            HFTokenizer(model_folder)
