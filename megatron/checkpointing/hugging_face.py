"""Which Hugging Face model a run and a checkpoint are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.checkpointing.agreement import on_first_rank
from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.files import read_json
from megatron.config import Config
from megatron.weights.published_config import PUBLISHED_FILE, QUANTIZATION, read_published_config
from megatron.weights.safetensors_folder import check_new

# Settings of a config.json that leave the model the same.
_OF_NO_MODEL = {
    *(
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "output_attentions",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", QUANTIZATION, "initializer_range"),
}
_ROPE = {"rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings"}


def published_config(config: Config) -> dict[str, Any] | None:
    """Return the config.json of the Hugging Face model of a run; None for a native one."""
    return None if config.model.hf_model is None else read_published_config(Path(config.model.hf_model))


def check_same_model(path: Path, config: Config) -> None:
    """Raise CheckpointError unless the checkpoint and the run are of the same Hugging Face model, or both of none."""
    own = published_config(config)
    saved = read_json(path / PUBLISHED_FILE) if (path / PUBLISHED_FILE).is_file() else None
    if own is None and saved is None:
        return
    if own is None or saved is None:
        what = (
            "a Hugging Face model; name its folder with --hf-model" if own is None else "a GPT or LLaMA of this program"
        )
        more = "" if own is None else "; leave --hf-model out and pass its flags"
        raise CheckpointError(f"the checkpoint {path} is of {what}{more}, or point --load elsewhere.")
    from megatron.hf.empty_model import config_of  # imports transformers, which native models do not need

    before, now = (config_of(each).to_dict() for each in (saved, own))
    ignored = _OF_NO_MODEL | (_ROPE if config.checkpoint.change_rope else set())
    names = sorted(
        name for name in before.keys() | now.keys() if name not in ignored and before.get(name) != now.get(name)
    )
    if names:
        listed = ", ".join(f"{name} is {before.get(name)!r} there and {now.get(name)!r} here" for name in names[:3])
        raise CheckpointError(
            f"the checkpoint {path} is of another model than --hf-model ({config.model.hf_model}): {listed}; name the "
            f"folder of its own model ({path / PUBLISHED_FILE} is its config.json), or point --load elsewhere."
        )


def check_export_folder(config: Config) -> None:
    """Raise CheckpointError on every rank if --save-hf names a folder that is not new. Collective over all ranks."""
    folder = config.checkpoint.save_hf
    if folder is not None:
        on_first_rank(lambda: check_new(Path(folder)))
