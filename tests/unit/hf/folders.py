"""Folders of tiny Hugging Face models, without weights."""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

LLAMA = "llama"
TINY: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 101, "max_position_embeddings": 128,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
BY_TYPE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 101, "bos_token_id": None, "eos_token_id": None},
    "gpt_oss": {**TINY, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16},
}


def folder_of(folder: Path, model_type: str, **changes: Any) -> Path:
    """Write the config.json of a tiny model, and an empty tokenizer.json."""
    config = CONFIG_MAPPING[model_type](**{**BY_TYPE.get(model_type, TINY), **changes})
    config.save_pretrained(folder)
    (folder / "tokenizer.json").touch()
    return folder
