"""RULER's tasks have the parts that they ask for, fill their length, and are scored by RULER's definition."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.ruler.questions import read_hotpot, read_squad
from megatron.evaluation.ruler.run import Plan, answer, averages, run_tasks
from megatron.evaluation.ruler.sample import Sample, Sized, fill
from megatron.evaluation.ruler.scoring import clean, match_all, match_part
from megatron.evaluation.ruler.tasks import Task, chosen_tasks, ruler_tasks
from megatron.evaluation.ruler.templates import own_templates, read_templates
from megatron.evaluation.ruler.text import TextSource
from megatron.generation.loading import Inference, OpenedModel
from tests.unit.weights.small_families import VOCAB, save

LETTERS = "abcdefghijklmnopqrstuvwxy"
WORDS = [f"word{first}{second}" for first in LETTERS for second in LETTERS]
TEXT = " ".join(f"Here {word} ends {number}." for number, word in enumerate(WORDS))
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Context {article}{paragraph} of some length.",
                    "qas": [
                        {"question": f"Question {article}{paragraph}?", "answers": [{"text": "some"}, {"text": "x"}]},
                        {"question": "Impossible?", "answers": [], "is_impossible": True},
                    ],
                }
                for paragraph in range(3)
            ]
        }
        for article in range(30)
    ]
}
HOTPOT = [
    {"question": f"Q{number}?", "answer": f"A{number}", "context": [[f"T{number}{i}", ["One. ", "Two."]] for i in "ab"]}
    for number in range(40)
]


class WordCodec:
    """A token per word, hashed into the vocabulary of the small models."""

    eod = VOCAB - 1

    def tokenize(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % (VOCAB - 1) for word in text.split()]

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(f" {token}" for token in ids)


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    questions = {
        "qa_1": read_squad(write_json(tmp_path / "squad.json", SQUAD)),
        "qa_2": read_hotpot(write_json(tmp_path / "hotpot.json", HOTPOT)),
    }
    return ruler_tasks(TextSource.of(TEXT), own_templates(), questions)


def test_the_scores_are_those_of_the_definition() -> None:
    predictions = [clean("\x00 Seven and\tTWO. "), "nothing", "c is in abc"]
    references = [("seven", "two", "nine"), ("x",), ("c", "d")]
    assert predictions[0] == "Seven and\nTWO."
    assert match_all(predictions, references) == 38.89  # (2/3 + 0 + 1/2) / 3
    assert match_part(predictions, references) == 66.67  # (1 + 0 + 1) / 3


NEEDLES = {
    "niah_single_1": (1, 1), "niah_single_2": (1, 1), "niah_single_3": (1, 1), "niah_multikey_1": (4, 1),
    "niah_multivalue": (4, 4), "niah_multiquery": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDLES)
def test_every_needle_lies_in_its_text(name: str, tasks: dict[str, Task]) -> None:
    num_needles, num_asked = NEEDLES[name]
    sample = tasks[name].build(np.random.default_rng(5), 50, 4096)
    needles = re.findall(r"One of the secret (\w+) of (\S+) is: (\S+)\.", sample.prompt)
    assert len(needles) == num_needles
    assert len(sample.references) == len(set(sample.references)) == num_asked
    question = sample.prompt[sample.prompt.rindex("\n") :]
    assert {value for _, key, value in needles if key in question} == set(sample.references)
    assert all((len(value) == 36) == (name == "niah_single_3") for value in sample.references)


@pytest.mark.parametrize("name, size", [("niah_multikey_2", 7), ("niah_multikey_3", 36)])
def test_a_needle_lies_among_others(name: str, size: int, tasks: dict[str, Task]) -> None:
    sample = tasks[name].build(np.random.default_rng(5), 50, 4096)
    lines = sample.prompt.split("\n")[1:-1]
    (value,) = sample.references
    assert len(lines) == len(set(lines)) == 51
    assert (len(value), sum(value in line for line in lines)) == (size, 1)


def test_a_chain_of_variables_leads_to_the_value(tasks: dict[str, Task]) -> None:
    sample = tasks["vt"].build(np.random.default_rng(5), 20, 4096)
    example, prompt = sample.prompt.split("\n\nThe text below assigns")
    (asked,) = re.findall(r"have the value (\d+)\?", prompt)
    value = {asked: asked}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt):
        value[name] = value[source]
    assert sample.references == tuple(value)[1:]
    assert set(value.values()) == {asked}
    assert len(sample.references) == 5
    assert example.split("these 5 variables")[1].count(" ") == 9  # with its answer


@pytest.mark.parametrize("name, length", [("cwe", 4096), ("cwe", 1024), ("fwe", 4096)])
def test_the_words_asked_for_are_the_most_frequent(name: str, length: int, tasks: dict[str, Task]) -> None:
    sample = tasks[name].build(np.random.default_rng(5), 100, length)
    prompt = sample.prompt[sample.prompt.rindex("Remember those" if name == "cwe" else "Count") :]
    context = prompt[prompt.index("\n") : prompt.index("\nQuestion")]
    counts = Counter(re.findall(r"[a-z]+", context))
    ranked = [word for word, _ in counts.most_common()]
    asked = len(sample.references)
    assert set(ranked[:asked]) == set(sample.references)
    assert counts[ranked[asked - 1]] > counts[ranked[asked]]
    assert counts[ranked[0]] == {"cwe4096": 30, "cwe1024": 6, "fwe4096": 15}[name + str(length)]


@pytest.mark.parametrize("name, documents", [("qa_1", 1), ("qa_2", 2)])
def test_a_question_has_its_documents_among_others(name: str, documents: int, tasks: dict[str, Task]) -> None:
    sample = tasks[name].build(np.random.default_rng(5), 20, 4096)
    numbers = re.findall(r"^Document (\d+):$", sample.prompt, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, documents + 21)]
    (asked,) = re.findall(r"Question: \w+?(?:tion )?(\d+)\?", sample.prompt)
    own = {"qa_1": f"Context {asked} ", "qa_2": f"\nT{asked}a\n"}[name]
    assert own in sample.prompt
    assert sample.references == {"qa_1": ("some", "x"), "qa_2": (f"A{asked}",)}[name]


def test_every_sample_fills_its_length_and_differs(tasks: dict[str, Task]) -> None:
    plan = Plan({name: task for name, task in tasks.items() if name[:2] != "qa"}, [4096], 2, seed=1)
    for name, task in plan.tasks.items():
        budget = 4096 - task.template.tokens_to_generate
        first, again, second = (plan.sample(WordCodec(), name, 4096, number) for number in (0, 0, 1))
        assert 0.95 * budget < first.num_tokens <= budget
        assert first == again
        assert first.sample.prompt != second.sample.prompt


def as_many(most: int) -> Callable[[int], Sized]:
    return lambda units: Sized(Sample("", ()), units, [0] * (10 + 3 * min(units, most)))


def test_units_are_as_many_as_fit() -> None:
    assert fill(as_many(10**6), 100, 0, 10**6).num_units == 30
    assert fill(as_many(10**6), 10, 0, 10**6).num_units == 0
    with pytest.raises(EvaluationError, match="the shortest prompt takes 10 tokens, and 9 are left"):
        fill(as_many(10**6), 9, 0, 10**6)
    with pytest.raises(EvaluationError, match="all of the source gives a prompt of 25 tokens, where 100"):
        fill(as_many(5), 100, 0, 5)


def test_answers_are_those_of_greedy_generation(tmp_path: Path, tasks: dict[str, Task]) -> None:
    save("llama", tmp_path)
    model = OpenedModel(tmp_path).build(Inference(torch.device("cpu"), torch.float64, chunk_size=128), 600)
    codec, plan = WordCodec(), Plan({"vt": tasks["vt"], "fwe": tasks["fwe"]}, [500, 600], 1, seed=1)
    results = list(run_tasks(model, codec, plan))
    assert [(each.task, each.length) for each in results] == [(t, n) for n in (500, 600) for t in ("vt", "fwe")]
    (first,) = results[0].answers
    prompt = codec.tokenize(first.prompt)
    assert first.num_tokens == len(prompt) <= 500 - 30
    assert first.prediction == answer(model, codec, prompt, 30)
    assert 0 < len(first.prediction.split()) <= 30
    assert averages(results).keys() == {500, 600}


def test_wording_comes_from_a_file_in_the_form_of_ruler(tmp_path: Path) -> None:
    niah = {
        "template": "Some {type_needle_v} are all here.\n{context}\n{query}",
        "answer_prefix": " They are",
        "tokens_to_generate": 9,
    }
    path = write_json(tmp_path / "templates.json", {"niah": niah, "noise": "Buzz."})
    templates = read_templates(path)
    task = ruler_tasks(TextSource.of(TEXT), templates, {})["niah_single_1"]
    prompt = task.build(np.random.default_rng(5), 3, 4096).prompt
    assert re.fullmatch(r"A number is here\.\n.*Buzz\..*\n\w+-\w+ They is", prompt, re.DOTALL)
    assert (task.template.tokens_to_generate, prompt.count("Buzz.")) == (9, 3)
    assert templates.families["qa"] == own_templates().families["qa"]


def test_what_cannot_be_built_is_refused(tmp_path: Path, tasks: dict[str, Task]) -> None:
    with pytest.raises(EvaluationError, match=r"--text has 2 different words of 4 to 12 letters, and the tasks need"):
        TextSource.of("word after word")
    with pytest.raises(EvaluationError, match=r"--tasks \(vtt\) must be of niah_single_1, .*; qa_1 needs --squad"):
        chosen_tasks(tasks, ["vt", "vtt"])
    for content in ({"niah": {}}, {"vt": 3, "qa": {"template": "{unknown}"}}, [], {"needle": "{a}"}):
        with pytest.raises(EvaluationError, match=r"--templates .* write it like the TASKS"):
            read_templates(write_json(tmp_path / "bad.json", content))
    for read, flag in ((read_squad, "--squad"), (read_hotpot, "--hotpot")):
        with pytest.raises(EvaluationError, match=f"{flag} .* does not have the form"):
            read(write_json(tmp_path / "bad.json", {"data": [3]}))
    with pytest.raises(EvaluationError, match="vt at --lengths 100: the shortest prompt takes"):
        Plan(tasks, [100], 1, 1).sample(WordCodec(), "vt", 100, 0)
