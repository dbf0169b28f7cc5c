"""Training of Hugging Face models with --hf-model: every execution and layout gives the same losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.integration.corpus import VOCAB_SIZE
from tests.integration.runs import FPDT, SEQ_LENGTH, TOKENIZER, TRAINING, Ranks, Run, train

ONE_CHUNK = ["--ds-sequence-parallel-fpdt-chunk-size", str(SEQ_LENGTH)]
SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB_SIZE + 1, "max_position_embeddings": SEQ_LENGTH},
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0},
    **{"short_factor": [1.0] * 8, "long_factor": [2.0 + number for number in range(8)]},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        **{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20},
        **{"output_router_logits": True, "router_aux_loss_coef": 0.5},
    },
    "llama": {**SIZES, "tie_word_embeddings": True},
    "phi3": {**SIZES, "hidden_size": 64, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
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
    run = train([*flags, *ONE_CHUNK], tmp_path / "want")
    assert ("router aux loss:" in run.output) == ("expert imbalance:" in run.output) == (family == "gpt_oss")
    want = losses_of(run)
    run = train(flags, tmp_path / "chosen", num_ranks=2)
    assert run.output.count(f"\n  checked          a small copy of {family} against transformers in ") == 1
    assert run.output.count("\n  experts          one product per expert ") == (family == "gpt_oss")
    assert losses_of(run) == pytest.approx(want, rel=2e-5)
    saving = ["--save", str(tmp_path / "saved"), "--save-interval", "2", "--zero-stage", "1"]
    train([*flags, *FPDT, *saving, "--exit-interval", "2"], tmp_path / "first", num_ranks=2)
    loading = ["--load", str(tmp_path / "saved"), "--zero-stage", "3", "--universal-checkpoint"]
    resumed = train([*flags, *FPDT, *loading], tmp_path / "resumed", num_ranks=2)
    assert list(resumed.losses.values()) == pytest.approx(want[2:4], rel=2e-5)


def test_every_rank_ends_where_the_model_would_be_trained_wrongly(corpus: Path, tmp_path: Path) -> None:
    CONFIG_MAPPING["bert"](num_hidden_layers=2, vocab_size=VOCAB_SIZE + 1).save_pretrained(tmp_path / "bert")
    flags = ["--hf-model", str(tmp_path / "bert"), "--seq-length", str(SEQ_LENGTH), *TOKENIZER, *TRAINING]
    flags += ["--data-path", str(corpus), "--split", "90,6,4", "--train-iters", "4"]
    with Ranks(flags, num_ranks=2) as ranks:
        first, second = ranks.wait()
    assert f"error: --hf-model ({tmp_path / 'bert'}) is a bert, which is not streamed: the mask of" in first.stderr
    assert (first.exit_code, second.exit_code) == (2, 2)
