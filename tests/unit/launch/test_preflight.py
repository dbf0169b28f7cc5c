"""Tokenizer and output folders are looked at before a training starts, and folders are not made."""

import base64
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from megatron.arguments import parse_args
from megatron.config import ConfigError
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDatasetWriter
from megatron.hf.settings import with_hugging_face_model
from megatron.launch.preflight import (
    Vocabulary,
    check_indexed_data,
    check_inputs,
    check_output_folders,
    check_writable,
)
from megatron.tokenizer import TokenizerError
from tests.unit.config.commands import parsed
from tests.unit.hf.folders import LLAMA, folder_of


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    check_writable("--save", tmp_path / "runs" / "llama")
    check_writable("--save", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_file_in_the_way_is_refused_by_the_flag(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=rf"--save \(.*\): {file} is not a folder; name a folder"):
        check_writable("--save", file / below)


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("megatron.launch.preflight.os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written; name a folder"):
        check_writable("--tensorboard-dir", tmp_path)


def test_a_folder_whose_name_is_too_long_is_refused_by_the_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--tensorboard-dir gives a file or folder a name of 256 bytes, xxx"):
        check_writable("--tensorboard-dir", tmp_path / ("x" * 256) / "run")


def test_a_warm_up_that_is_too_long_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"warm-up \(99 iters\) must not be longer than the decay \(\d+ iters\)"):
        check_inputs(parsed("--data-path absent --lr-warmup-iters 99"), 1, check_indexed_data)


def test_the_tokenizers_flags_reach_it_and_its_vocabulary_is_padded(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"".join(base64.b64encode(bytes([k])) + b" %d\n" % k for k in range(256)))
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    flags = f"--data-path {tmp_path / 'data'} --tokenizer-type TikTokenizer --tokenizer-model {model}"
    flags += " --make-vocab-size-divisible-by 8"
    vocabulary = check_inputs(parsed(f"{flags} --tiktoken-pattern gpt4"), 1, check_indexed_data)
    assert vocabulary == Vocabulary(280, 257)  # 256 bytes and 21 places, padded
    with pytest.raises(TokenizerError, match="has 256 tokens, as many as no published file"):
        check_inputs(parsed(flags), 1, check_indexed_data)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--save runs --save-hf runs/hf", None),
        (
            "--save runs --save-hf runs",
            r"--save-hf \(runs\) must be a folder of its own, and --save \(runs\) is written",
        ),
        ("--tensorboard-dir runs/events --save-hf ./runs", r"own, and --tensorboard-dir \(runs/events\) .* runs/hf$"),
    ],
)
def test_the_exported_folder_is_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, message: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_output_folders(parsed(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vocab-size 90", None),
        ("--vocab-size 101", r"ends a document with id 101, and the model of --hf-model \(.*\) has 101 ids"),
        ("--vocab-size 4", r"token id 7 in document 0 .* is outside the vocabulary, ids 0 to 4"),
    ],
)
def test_the_vocabulary_of_a_hugging_face_model_is_its_own(tmp_path: Path, flags: str, message: str | None) -> None:
    folder = folder_of(tmp_path / "model", LLAMA)
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1, 2, 7])
    command = f"--hf-model {folder} --seq-length 64 --lr 1e-4 --train-iters 1 --data-path {tmp_path / 'data'}"
    config = with_hugging_face_model(parse_args(f"{command} --tokenizer-type NullTokenizer {flags}".split()), 1)
    if message is None:
        assert check_inputs(config, 1, check_indexed_data) == Vocabulary(101, 90)
        return
    with pytest.raises((ConfigError, DataError), match=message):
        check_inputs(config, 1, check_indexed_data)
