import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from megatron.config.tokenizer import TokenizerConfig
from megatron.data.encoding import EncodedBatch, EncoderPlan, encode_batches
from megatron.data.errors import DataError
from megatron.data.text_files import InputPosition, RecordBatch
from megatron.tokenizer import TokenizerError

PLAN = EncoderPlan(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=70_000), append_eod=True)


def batch_of(*texts: str, first: int = 0) -> RecordBatch:
    return RecordBatch("a.parquet", "parquet", ("text",), first, [(text.encode(),) for text in texts], InputPosition(1))


def documents(batches: Iterator[EncodedBatch]) -> list[list[int]]:
    return [
        tokens.tolist()
        for batch in batches
        for tokens in np.split(batch.tokens[0], np.cumsum(batch.sizes[0])[:-1])
        if len(batch.sizes[0])
    ]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_documents_keep_their_order(num_workers: int) -> None:
    batches = [batch_of(f"{k} 7", f"{k}") for k in range(60)]
    expected = [tokens for k in range(60) for tokens in ([k, 7, 70_000], [k, 70_000])]
    assert documents(encode_batches(iter(batches), PLAN, num_workers)) == expected


def test_an_empty_text_gets_no_end_of_document() -> None:
    (batch,) = encode_batches([batch_of("", "1")], PLAN, 1)
    assert batch.sizes[0].tolist() == [0, 2]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_in_a_worker_reaches_the_caller(num_workers: int) -> None:
    with pytest.raises(TokenizerError, match=r"a\.parquet, row 6: NullTokenizer got 'word'"):
        list(encode_batches([batch_of("1", "word", first=4)], PLAN, num_workers))


def test_a_killed_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.encoding._encode_batch", kill_this_worker)
    with pytest.raises(DataError, match="ended from outside, most likely for lack of memory; use fewer --workers"):
        list(encode_batches([batch_of("1")], PLAN, 2))


def kill_this_worker(plan: EncoderPlan, batch: RecordBatch) -> EncodedBatch:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("lives on")
