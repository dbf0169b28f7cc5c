"""Where needles are put, and how answers are scored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.heat_map import draw_heat_map
from megatron.evaluation.needle import SyntheticHaystack, TextHaystack, bury, find_needles, score
from megatron.evaluation.recall import RecallVocabulary
from megatron.generation.cached_model import CachedModel
from megatron.generation.generate import generate
from megatron.generation.loading import Inference, OpenedModel
from megatron.generation.sampling import Sampling
from tests.unit.weights.small_families import VOCAB, our_logits, save

SYNTHETIC = SyntheticHaystack(RecallVocabulary(vocab_size=VOCAB - 1, num_keys=4, num_values=10))


def as_ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def as_text(ids: list[int]) -> str:
    return "".join(chr(token) for token in ids)


@pytest.fixture
def model(tmp_path: Path) -> CachedModel:
    save("llama", tmp_path)
    inference = Inference(torch.device("cpu"), torch.float64, chunk_size=8, offloading=True)
    return OpenedModel(tmp_path).build(inference, 64)


@pytest.mark.parametrize("depth, place", [(0.0, 0), (0.5, 18), (1.0, 36)])
def test_a_synthetic_needle_lies_at_its_depth(depth: float, place: int) -> None:
    prompt, needle = bury(SYNTHETIC, np.random.default_rng(3), 40, depth)
    key, value = needle.statement
    assert len(prompt) + len(needle.answer) == 40
    assert prompt[place : place + 2] == [key, value]
    assert (prompt[-1], needle.answer) == (key, (value,))
    assert sum(token < 14 for token in prompt) == 3


def test_a_needle_of_text_says_what_the_question_asks() -> None:
    haystack = TextHaystack(as_ids("some straw "), as_ids, " The number of {key} is")
    prompt, needle = bury(haystack, np.random.default_rng(3), 150, 0.3)
    text, question, answer = as_text(prompt), as_text(list(needle.question)), as_text(list(needle.answer))
    assert len(text) + len(answer) == 150
    assert text.endswith(question)
    assert text.count(question + answer + ".\n") == 1
    assert "straw some straw some" in text
    assert answer[0] == " "
    assert len(answer) == 6


def test_needles_and_straw_differ_from_trial_to_trial() -> None:
    prompts = {tuple(bury(SYNTHETIC, np.random.default_rng(seed), 40, 0.5)[0]) for seed in range(5)}
    assert len(prompts) == 5


def test_the_score_is_that_of_the_greedy_answer_and_of_its_probability(model: CachedModel) -> None:
    prompt, _ = bury(SYNTHETIC, np.random.default_rng(3), 30, 0.5)
    (generated,) = generate(model, [prompt], [4], Sampling(greedy=True))
    for answer in (generated.tokens, [*generated.tokens[:3], 7], [7, *generated.tokens[1:]], generated.tokens[:1]):
        is_right, probability = score(model, prompt, answer)
        logits = our_logits(model.model, torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        log_probabilities = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
        assert probability == pytest.approx(float(log_probabilities.sum().exp()), rel=1e-9)
        assert is_right == (answer == generated.tokens[: len(answer)])


def test_there_is_a_cell_for_each_length_and_depth(model: CachedModel, tmp_path: Path) -> None:
    cells = find_needles(model, SYNTHETIC, [12, 40], [0.0, 0.5, 1.0], trials=3, seed=1)
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in (12, 40) for d in (0.0, 0.5, 1.0)]
    assert all(0 <= cell.accuracy <= 1 and 0 < cell.probability < 1 for cell in cells)
    assert cells == find_needles(model, SYNTHETIC, [12, 40], [0.0, 0.5, 1.0], trials=3, seed=1)
    draw_heat_map(cells, tmp_path / "map.png", "cells")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(EvaluationError, match="a needle takes 4 tokens, and does not fit into a length of 3"):
        bury(SYNTHETIC, np.random.default_rng(0), 3, 0.5)
    with pytest.raises(EvaluationError, match="the haystack has no text"):
        TextHaystack([], as_ids, "{key}")
    with pytest.raises(EvaluationError, match=r"must hold \{key\}"):
        TextHaystack([1], as_ids, "the number")
