"""Adapters on a model of --hf-model: trained, resumed to the bit, written for peft, merged, and loaded again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tests.integration.runs import FPDT, SEQ_LENGTH, TOKENIZER, TRAINING, train
from tests.integration.test_hf_model import folder_of

CONVERTER = [sys.executable, "tools/hf2megads_weight_converter.py", "to-hf"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = folder_of("llama", tmp_path / "base")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(corpus: Path, base: Path) -> list[str]:
    flags = ["--hf-model", str(base), "--seq-length", str(SEQ_LENGTH), *TOKENIZER, *TRAINING, *FPDT]
    return [*flags, "--data-path", str(corpus), "--split", "90,6,4", "--train-iters", "4", "--eval-iters", "0"]


def test_adapters_are_trained_resumed_and_written(flags: list[str], base: Path, tmp_path: Path) -> None:
    lora, saved = ["--lora-rank", "4", "--lora-dropout", "0.1"], tmp_path / "saved"
    saving = ["--save", str(saved), "--save-interval", "2", "--save-hf"]
    whole = train([*flags, *lora, *saving, str(tmp_path / "adapter")], tmp_path / "whole")
    (saved / "latest").write_text("global_step2")
    merging = ["--load", str(saved), "--save-hf", str(tmp_path / "merged"), "--merge-adapter"]
    resumed = train([*flags, *lora, *merging], tmp_path / "resumed")
    assert list(resumed.losses.values()) == list(whole.losses.values())[2:]
    assert f"saved {tmp_path / 'adapter'}, an adapter" in whole.output
    assert f"saved {tmp_path / 'merged'}, a Hugging Face model" in resumed.output
    model = AutoModelForCausalLM.from_pretrained(base)
    want = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    universal = [sys.executable, "tools/make_universal_checkpoint.py", str(saved / "global_step2"), str(tmp_path / "u")]
    subprocess.run(universal, check=True)
    again = train([*flags, *lora, "--load", str(tmp_path / "u"), "--zero-stage", "3"], tmp_path / "again", num_ranks=2)
    assert list(again.losses.values()) == pytest.approx(list(resumed.losses.values()), rel=1e-2)
    subprocess.run([*CONVERTER, str(saved / "global_step4"), str(tmp_path / "converted")], check=True)
    file = "adapter_model.safetensors"
    assert (tmp_path / "converted" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
    continued = train([*flags, "--load-adapter", str(tmp_path / "adapter")], tmp_path / "continued")
    merged = train([*flags, "--hf-model", str(tmp_path / "merged"), "--lora-rank", "4"], tmp_path / "from merged")
    assert continued.losses[1] == pytest.approx(merged.losses[1], rel=1e-2)
