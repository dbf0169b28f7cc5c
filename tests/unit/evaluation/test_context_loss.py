"""Loss by context, against the logits of the tokens it is of."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron.evaluation.context_loss import loss_by_context
from megatron.evaluation.errors import EvaluationError
from megatron.generation.loading import Inference, OpenedModel
from megatron.model.transformer import GPTModel
from tests.unit.weights.small_families import VOCAB, our_logits, save

SCORED, CONTEXTS = 6, (1, 9, 20)
DOCUMENTS = torch.randint(0, VOCAB, (3, 30), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> GPTModel:
    save(request.param, tmp_path)
    inference = Inference(torch.device("cpu"), torch.float64, chunk_size=8, offloading=True)
    return OpenedModel(tmp_path).build(inference, 26).model


def test_each_loss_is_of_the_same_tokens_behind_its_context(model: GPTModel) -> None:
    results = loss_by_context(model, DOCUMENTS, CONTEXTS, SCORED)
    for result, context in zip(results, CONTEXTS, strict=True):
        tokens = torch.tensor(DOCUMENTS)[:, 20 - context : 26]
        logits = our_logits(model, tokens)[:, context - 1 : -1]
        want = F.cross_entropy(logits.flatten(0, 1), tokens[:, context:].flatten())
        assert result.context == context
        assert result.num_tokens == 18
        assert result.loss == pytest.approx(float(want), rel=1e-9)
        assert result.perplexity == pytest.approx(float(want.exp()), rel=1e-9)


def test_the_context_counts(model: GPTModel) -> None:
    assert len({result.loss for result in loss_by_context(model, DOCUMENTS, CONTEXTS, SCORED)}) == len(CONTEXTS)


def test_short_or_absent_documents_are_refused(model: GPTModel) -> None:
    with pytest.raises(EvaluationError, match=r"a document has 25 tokens, .*\(20\) with 6 tokens behind it needs 26"):
        loss_by_context(model, [DOCUMENTS[0][:25]], CONTEXTS, SCORED)
    with pytest.raises(EvaluationError, match="no documents of 26 tokens"):
        loss_by_context(model, [], CONTEXTS, SCORED)
