"""tools/check_hf_models.py says which models train here as in transformers."""

import json

import pytest
from transformers import CONFIG_MAPPING

import megatron.hf.proof as proof
from tests.unit.tools.tool import run_tool


def test_a_folder_and_a_model_type_pass(tmp_path, capsys):
    CONFIG_MAPPING["qwen3"](num_hidden_layers=4).save_pretrained(tmp_path)
    assert run_tool("check_hf_models", tmp_path, "llama") == 0
    first, second, summary = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}  passes   checked a small copy of qwen3 against transformers in ")
    assert second.split()[:2] == ["llama", "passes"]
    assert summary == "2 passes"


@pytest.mark.parametrize(
    "name, outcome",
    [
        ("mamba", "refused  the Hugging Face model (mamba) cannot be streamed: 32 of its 32 layers carry a state"),
        ("no/such/folder", "invalid  transformers has no such configuration: "),
    ],
)
def test_others_do_not_pass(name, outcome, capsys):
    assert run_tool("check_hf_models", name) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}  {outcome}")


def test_a_wrong_gradient_is_told_from_a_refusal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(proof, "TOLERANCE", 0.0)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama"}))
    assert run_tool("check_hf_models", file) == 1
    assert "  wrong    the Hugging Face model (llama) trains otherwise here than in transf" in capsys.readouterr().out
