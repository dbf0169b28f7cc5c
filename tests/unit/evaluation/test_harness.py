"""The adapter for lm-eval answers its requests by the model's logits, and a task of one's own runs without network."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.evaluation.errors import EvaluationError
from megatron.generation.loading import Inference, OpenedModel
from tests.unit.evaluation.test_long_perplexity import DOCUMENT, log_probabilities
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import VOCAB, save

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")

TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB - 1]
TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""


def request(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_requests_are_answered_by_the_logits(tmp_path: Path) -> None:
    from megatron.evaluation.harness import HarnessModel
    from megatron.tokenizer import build_tokenizer

    save("llama", tmp_path)
    model = OpenedModel(tmp_path).build(Inference(torch.device("cpu"), torch.float64, chunk_size=8), 48)
    codec = build_tokenizer("NullTokenizer", vocab_size=VOCAB - 1)
    harness = HarnessModel(model, codec, longest=40)
    text = " ".join(map(str, DOCUMENT[:30]))
    context, scored = " ".join(map(str, DOCUMENT[:20])), " " + " ".join(map(str, DOCUMENT[20:30]))
    ((log_probability, is_greedy),) = harness.loglikelihood([request(context, scored)], disable_tqdm=True)
    assert log_probability == pytest.approx(float(log_probabilities(model, DOCUMENT[:30])[19:].sum()), rel=1e-9)
    assert not is_greedy
    (rolling,) = harness.loglikelihood_rolling([request(text)])
    assert rolling == pytest.approx(float(log_probabilities(model, [codec.eod, *DOCUMENT[:30]]).sum()), rel=1e-9)
    (answer,) = harness.generate_until([request(text, {"max_gen_toks": 6, "until": []})])
    assert harness.loglikelihood([request(text, " " + answer.strip())], disable_tqdm=True)[0][1]
    third = answer.split()[2]
    (stopped,) = harness.generate_until([request(text, {"max_gen_toks": 6, "until": [third]})])
    assert stopped == answer[: answer.index(third)]
    with pytest.raises(EvaluationError, match=r"generation_kwargs of the task \(num_beams\) must be of"):
        harness.generate_until([request(text, {"num_beams": 2, "max_gen_toks": 1})])
    with pytest.raises(EvaluationError, match=r"takes 41 tokens, answer included, more than --max-length \(40\)"):
        harness.generate_until([request(text, {"max_gen_toks": 11})])


def test_a_task_of_ones_own_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    save("llama", tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps([{"question": "3 4 5", "answer": "6"}] * 3))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text(TASK.format(data=tmp_path / "data.json", kind="generate_until"))
    flags = [
        "--load",
        tmp_path / "model",
        *TOKENIZER,
        "--max-length",
        300,
        "--tasks",
        "mine",
        "--include-path",
        tmp_path / "tasks",
    ]
    assert run_tool("eval_harness", *flags, "--limit", 2, "--output", tmp_path / "out.json") == 0
    assert "mine" in capsys.readouterr().out
    assert "mine" in json.loads((tmp_path / "out.json").read_text())["results"]
