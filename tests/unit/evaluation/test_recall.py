"""Documents of keys and values: what can be told of them can be told, and what is cut is cut."""

import numpy as np
import pytest

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.recall import RecallVocabulary, recall_documents

VOCABULARY = RecallVocabulary(vocab_size=40, num_keys=5, num_values=12)


def test_a_key_has_one_value_in_a_document_and_others_in_others() -> None:
    values_of_key_0 = set()
    for document in recall_documents(VOCABULARY, 200, 64, 20, seed=1):
        assert len(document) == 64
        assert document[-1] == 40
        assert (document[:-1] < 40).all()
        keys = np.flatnonzero(document < 5)
        assert 2 <= len(keys) <= 20
        pairs = {(int(document[k]), int(document[k + 1])) for k in keys}
        assert len(pairs) == len({key for key, _ in pairs})
        assert all(5 <= value < 17 for _, value in pairs)
        assert ((document >= 5) & (document < 17)).sum() == len(keys)
        values_of_key_0 |= {value for key, value in pairs if key == 0}
    assert len(values_of_key_0) == 12


def test_mentions_are_spread_over_the_document() -> None:
    places = np.concatenate([np.flatnonzero(d < 5) for d in recall_documents(VOCABULARY, 500, 64, 20, seed=1)])
    shares = np.histogram(places, 4, (0, 64))[0] / len(places)
    assert (abs(shares - 0.25) < 0.03).all()


def test_ends_cut_the_same_documents() -> None:
    whole = list(recall_documents(VOCABULARY, 20, 64, 20, seed=1))
    cut = list(recall_documents(VOCABULARY, 20, 64, 20, seed=1, ends_every=16))
    for a, b in zip(whole, cut, strict=True):
        assert b[[15, 31, 47, 63]].tolist() == [40] * 4
        others = np.arange(64) % 16 != 15
        assert (a[others] == b[others]).all()


def test_a_seed_repeats() -> None:
    first, again, other = (np.stack(list(recall_documents(VOCABULARY, 3, 64, 20, seed))) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RecallVocabulary(16, 4, 12), r"must be 1 or more each and leave ids .* a vocabulary of 17 or more"),
        (lambda: RecallVocabulary(16, 0, 12), "must be 1 or more each"),
        (lambda: list(recall_documents(VOCABULARY, 1, 64, 1, 1)), "1 mentions must be 2 or more"),
        (lambda: list(recall_documents(VOCABULARY, 1, 64, 32, 1)), "use 31 or fewer"),
        (lambda: list(recall_documents(VOCABULARY, 1, 64, 4, 1, 2)), "use 3 or more"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        make()
