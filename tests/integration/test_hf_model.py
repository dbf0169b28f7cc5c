"""Training of Hugging Face models with --hf-model: every execution and layout gives the same losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.integration.corpus import VOCAB_SIZE
from tests.integration.runs import FPDT, SEQ_LENGTH, TOKENIZER, TRAINING, Run, train

ONE_CHUNK = ["--ds-sequence-parallel-fpdt-chunk-size", str(SEQ_LENGTH)]
SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB_SIZE + 1, "max_position_embeddings": SEQ_LENGTH},
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20},
    "llama": {**SIZES, "tie_word_embeddings": True},
}


def folder_of(family: str, folder: Path) -> Path:
    """Write a tiny model's folder; without weights for a Llama."""
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    torch.manual_seed(1)
    (config if family == "llama" else AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder


def losses_of(run: Run) -> list[float]:
    return [*run.losses.values(), *run.validation_losses.values(), *run.grad_norms.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_execution_arrives_at_the_same_losses(corpus: Path, tmp_path: Path, family: str) -> None:
    folder = folder_of(family, tmp_path / family)
    flags = ["--hf-model", str(folder), "--seq-length", str(SEQ_LENGTH), *TOKENIZER, *TRAINING]
    flags += ["--data-path", str(corpus), "--split", "90,6,4", "--train-iters", "4", "--eval-iters", "1"]
    want = losses_of(train([*flags, *ONE_CHUNK], tmp_path / "want"))
    chosen = losses_of(train(flags, tmp_path / "chosen", num_ranks=2))
    assert chosen == pytest.approx(want, rel=2e-5)
    saving = ["--save", str(tmp_path / "saved"), "--save-interval", "2", "--zero-stage", "1"]
    train([*flags, *FPDT, *saving, "--exit-interval", "2"], tmp_path / "first", num_ranks=2)
    loading = ["--load", str(tmp_path / "saved"), "--zero-stage", "3", "--universal-checkpoint"]
    resumed = train([*flags, *FPDT, *loading], tmp_path / "resumed", num_ranks=2)
    assert list(resumed.losses.values()) == pytest.approx(want[2:4], rel=2e-5)
