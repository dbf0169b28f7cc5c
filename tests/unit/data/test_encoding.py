import pytest

from megatron.data.encoding import EncoderPlan, encode_documents
from megatron.tokenizer import TokenizerError

PLAN = EncoderPlan("NullTokenizer", None, None, None, 70_000, append_eod=True)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_documents_keep_their_order(num_workers: int) -> None:
    documents = [([f"{k} 7"], k) for k in range(300)]
    encoded = list(encode_documents(iter(documents), PLAN, num_workers))
    assert [(texts[0].tolist(), size) for texts, size in encoded] == [([k, 7, 70_000], k) for k in range(300)]


def test_an_empty_text_gets_no_end_of_document() -> None:
    (((tokens,), _),) = encode_documents([([""], 0)], PLAN, 1)
    assert len(tokens) == 0


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_in_a_worker_reaches_the_caller(num_workers: int) -> None:
    with pytest.raises(TokenizerError, match="NullTokenizer got 'word'"):
        list(encode_documents([(["word"], 4)], PLAN, num_workers))
