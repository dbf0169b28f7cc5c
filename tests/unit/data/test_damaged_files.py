"""Valid files with bytes changed at random: a reader returns the file's content or raises DataError, nothing else."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.errors import DataError
from megatron.data.index_file import HEADER
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron.data.text_files import InputPosition, read_batches, read_documents

NUM_CASES = 300
LINES = [{"text": f"text {number} € {'x' * number}", "n": [number, {"a": None}]} for number in range(30)]
JSON_LINES = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()


def as_parquet(_: bytes) -> bytes:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink: Any = arrow.BufferOutputStream()
    parquet.write_table(
        arrow.table({"text": [line["text"] for line in LINES]}), sink, row_group_size=11, write_page_checksum=True
    )
    content: bytes = sink.getvalue().to_pybytes()
    return content


def as_zstd(content: bytes) -> bytes:
    module: Any = pytest.importorskip("zstandard")
    compressed: bytes = module.ZstdCompressor(write_checksum=True).compress(content)
    return compressed


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": as_zstd,
    "a.parquet": as_parquet,
}


def damaged(content: bytes, seed: int) -> bytes:
    """Change, insert, remove or duplicate a few bytes, or truncate; every kind of damage is frequent."""
    source = random.Random(seed)
    result = bytearray(content)
    for _ in range(source.choice([1, 1, 1, 2, 5])):
        start = source.randrange(len(result) + 1) % max(len(result), 1)
        kind = source.randrange(6)
        if kind == 0:
            result[start : start + 1] = source.randbytes(1)
        elif kind == 1:
            result[start : start + 1] = bytes([(result + b"0")[start] ^ 1 << source.randrange(8)])
        elif kind == 2:
            del result[start : start + source.randint(1, 9)]
        elif kind == 3:
            result[start:start] = source.randbytes(source.randint(1, 9))
        elif kind == 4:
            result[start : start + 8] = source.choice([b"\xff" * 8, b"\0" * 8, (2**63 - 1).to_bytes(8, "little")])
        else:
            del result[start + 1 :]
    return bytes(result)


@pytest.mark.parametrize("name", PACKED)
def test_damaged_text_is_read_or_refused(tmp_path: Path, name: str) -> None:
    whole, path = PACKED[name](JSON_LINES), tmp_path / name
    expected = [[line["text"]] for line in LINES]
    messages = []
    for seed in range(NUM_CASES):
        path.write_bytes(damaged(whole, seed))
        try:
            texts = [texts for texts, _ in read_documents([path], "auto", ["text"])]
        except DataError as error:
            messages.append(str(error))
            continue
        assert all(isinstance(text, str) for (text,) in texts), f"seed {seed}"
        if name.endswith((".gz", ".zst", ".parquet")):  # their checksums let no other text through
            assert texts == expected[: len(texts)], f"seed {seed}"
    assert len(messages) > NUM_CASES // 4
    assert [message for message in messages if name not in message or "\n" in message] == []


@pytest.mark.parametrize("name", PACKED)
def test_resuming_from_any_record_gives_the_rest(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PACKED[name](JSON_LINES))
    for first in range(len(LINES) + 1):
        batches = read_batches([tmp_path / name], "auto", ["text"], InputPosition(0, first))
        texts = [batch.texts(index) for batch in batches for index in range(len(batch.records))]
        assert texts == [[line["text"]] for line in LINES[first:]]


@pytest.mark.parametrize("ending", ["idx", "bin"])
def test_a_damaged_dataset_is_read_as_its_sizes_say_or_refused(tmp_path: Path, ending: str) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.int32) as writer:
        for size in (3, 0, 5, 1, 7):
            writer.add_sequence(range(size))
            if size != 5:
                writer.end_document()
    path = tmp_path / f"data.{ending}"
    whole = path.read_bytes()
    messages = []
    # Most can go wrong in the header, so half of the cases damage only the header.
    for seed in range(2 * NUM_CASES):
        content = damaged(whole, seed)
        if ending == "idx" and seed % 2:
            content = damaged(whole[: HEADER.size], seed) + whole[HEADER.size :]
        path.write_bytes(content)
        try:
            dataset = IndexedDataset(tmp_path / "data")
        except DataError as error:
            messages.append(str(error))
            continue
        sequences = [dataset.get(number) for number in range(len(dataset))]
        documents = [dataset.get_document(number) for number in range(dataset.num_documents)]
        assert [len(sequence) for sequence in sequences] == dataset.sizes.tolist(), f"seed {seed}"
        assert sum(map(len, documents)) == dataset.num_tokens, f"seed {seed}"
        if len(documents):
            np.testing.assert_array_equal(np.concatenate(sequences), np.concatenate(documents))
        assert dataset.num_tokens * dataset.dtype.itemsize == (tmp_path / "data.bin").stat().st_size, f"seed {seed}"
    assert len(messages) > NUM_CASES // 2
    assert [message for message in messages if "data." not in message or "\n" in message] == []
