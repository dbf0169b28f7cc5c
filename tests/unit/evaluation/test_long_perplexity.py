"""Token scores, LongPPL and the short-context verdict, against logits and definitions."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.long_perplexity import KeyTokenRule, key_tokens_in, measure_document, pooled
from megatron.evaluation.short_context import compare, document_losses
from megatron.generation.cached_model import CachedModel
from megatron.generation.loading import Inference, OpenedModel
from megatron.generation.token_scores import score_tokens
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import VOCAB, our_logits, save

DOCUMENT = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(2)).tolist()
RULE = KeyTokenRule(short_context=7, stride=5, gain=0.05, likely=-4.3)


@pytest.fixture
def model(tmp_path: Path) -> CachedModel:
    save("llama", tmp_path)
    inference = Inference(torch.device("cpu"), torch.float64, chunk_size=8, offloading=True)
    return OpenedModel(tmp_path).build(inference, 48)


def log_probabilities(model: CachedModel, tokens: list[int]) -> Tensor:
    """Of all tokens but the first, [T - 1, V] logits at once."""
    logits = our_logits(model.model, torch.tensor([tokens]))[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]


@pytest.mark.parametrize("first", [1, 8, 9, 10, 17, 39])
def test_scores_are_those_of_the_logits(model: CachedModel, first: int) -> None:
    greedy = our_logits(model.model, torch.tensor([DOCUMENT]))[0, :-1].argmax(-1)
    document = [*DOCUMENT[:20], int(greedy[19]), *DOCUMENT[21:]]  # one token is the most likely
    scores = score_tokens(model, document, first)
    torch.testing.assert_close(scores.log_probabilities, log_probabilities(model, document)[first - 1 :])
    assert len(scores.is_most_likely) == 40 - first
    if first <= 20:
        assert scores.is_most_likely[20 - first]
    assert int(scores.is_most_likely.sum()) < 8


def test_key_tokens_are_those_that_the_long_context_makes_likelier(model: CachedModel) -> None:
    long = log_probabilities(model, DOCUMENT)
    want = []
    for place in range(RULE.short_context, len(DOCUMENT)):
        start = (place - RULE.short_context) // RULE.stride * RULE.stride
        short = log_probabilities(model, DOCUMENT[start : place + 1])[-1]
        if long[place - 1] - short > RULE.gain and long[place - 1] > RULE.likely:
            want.append(place)
    result = measure_document(model, DOCUMENT, RULE)
    assert 2 < len(want) < 30
    assert result.key_tokens == tuple(want)
    assert result.key_loss == pytest.approx(float(-long[torch.tensor(want) - 1].mean()), rel=1e-9)
    assert result.loss == pytest.approx(float(-long.mean()), rel=1e-9)
    given = measure_document(model, DOCUMENT, RULE, key_tokens=[3, 39])
    assert given.key_loss == pytest.approx(float(-(long[2] + long[38]) / 2), rel=1e-9)
    perplexity, long_perplexity, num_key = pooled([result, given])
    assert perplexity == pytest.approx(math.exp(result.loss), rel=1e-9)
    mean = (result.key_loss * len(want) + given.key_loss * 2) / (len(want) + 2)
    assert (long_perplexity, num_key) == (pytest.approx(math.exp(mean), rel=1e-9), len(want) + 2)
    assert math.isnan(pooled([measure_document(model, DOCUMENT, RULE, [])])[1])


@pytest.mark.parametrize(
    "after, verdict",
    [([1.0, 2.0, 3.0], "no regression"), ([1.1, 2.1, 3.11], "regression"), ([1.1, 1.8, 3.2], "undecided")],
)
def test_the_verdict_weighs_the_difference_by_its_error(after: list[float], verdict: str) -> None:
    result = compare([1.0, 2.0, 3.0], after, 0.02)
    assert result.verdict == verdict
    assert result.difference == pytest.approx(sum(after) / 3 - 2)
    with pytest.raises(EvaluationError, match="1 documents are long enough, and a comparison needs 2"):
        compare([1.0], [1.0], 0.02)


def test_key_tokens_of_another_document_are_refused(model: CachedModel) -> None:
    with pytest.raises(EvaluationError, match="--key-tokens has none for a document of 40 tokens"):
        key_tokens_in({"documents": [{"digest": "other", "key_tokens": []}]}, DOCUMENT)
    assert document_losses(model, [DOCUMENT]) == [pytest.approx(float(-log_probabilities(model, DOCUMENT).mean()))]


def test_both_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("llama", tmp_path / "model")
    texts = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, text in enumerate(texts):
        text.write_text(" ".join(str(token * (number + 1) % (VOCAB - 1)) for token in DOCUMENT))
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB - 1]
    flags = ["--load", tmp_path / "model", *tokenizer, "--text", *texts, "--length", 40, "--output"]
    longppl = ["longppl", *flags, tmp_path / "long.json", "--short-context", 4, "--stride", 4]
    assert run_tool("eval_long_context", *longppl) == 0
    content = json.loads((tmp_path / "long.json").read_text())
    assert [each["num_tokens"] for each in content["documents"]] == [40, 40, 40]
    assert f"{content['perplexity']:.3f}" in capsys.readouterr().out
    again = ["longppl", *flags, tmp_path / "again.json", "--short-context", 4, "--key-tokens", tmp_path / "long.json"]
    assert run_tool("eval_long_context", *again) == 0
    assert json.loads((tmp_path / "again.json").read_text())["documents"] == content["documents"]
    short = ["short", "--before", tmp_path / "model", *flags, tmp_path / "short.json"]
    assert run_tool("eval_long_context", *short) == 0
    assert json.loads((tmp_path / "short.json").read_text())["verdict"] == "no regression"
    assert run_tool("eval_long_context", "short", "--before", "x", *flags, "y", "--length", 99) == 2
    assert "there are no documents of 99 tokens" in capsys.readouterr().err
    assert run_tool("eval_long_context", "short", "--before", "x", *flags, "y", "--length", 1) == 2
    assert "--length (1) must be 2 or more" in capsys.readouterr().err
    assert run_tool("eval_long_context", *longppl, "--short-context", 40) == 2
    assert "--short-context (40) must be 1 or more and below --length (40)" in capsys.readouterr().err
