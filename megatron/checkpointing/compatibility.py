"""Check that this run can load a checkpoint: same model, and same partitioning unless a change is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.checkpointing.adapters import check_adapters
from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.files import read_json
from megatron.config import Config, describe_mismatch, zero_stage_run
from megatron.config.rules.common import flag, listed, shown, value_of
from megatron.weights.opening import is_layout_free, is_portable
from megatron.weights.portable import check_portable

# Settings of a run that determine the order of its sums, and so the last bits of its weights.
ORDER_OF_SUMS = (
    *("deterministic_mode", "attention_backend", "micro_batch_size", "ds_sequence_parallel_size"),
    *("ds_sequence_parallel_fpdt", "ds_sequence_parallel_fpdt_chunk_size"),
)


@dataclass(frozen=True)
class Layout:
    """The settings that DeepSpeed's files depend on besides the architecture."""

    num_ranks: int
    zero_stage: int
    number_format: str
    padded_vocab_size: int

    @classmethod
    def of(cls, config: Config, num_ranks: int, padded_vocab_size: int) -> Layout:
        """Return the layout that a run writes and can read."""
        precision = config.precision
        number_format = "--bf16" if precision.bf16 else "--fp16" if precision.fp16 else "fp32"
        return cls(num_ranks, zero_stage_run(config), number_format, padded_vocab_size)

    @property
    def partitioning(self) -> str:
        """The settings that optimizer states depend on."""
        return f"{self.num_ranks} ranks, --zero-stage {self.zero_stage}, {self.number_format}"


def check_checkpoint(path: Path, config: Config, num_ranks: int, padded_vocab_size: int) -> None:
    """Raise CheckpointError, or WeightsError for portable weights, unless this run can load them. Reads no tensor."""
    if is_portable(path) and config.model.hf_model is not None:
        raise CheckpointError(
            f"--load ({path}) is a folder of weights, and the weights of a Hugging Face model come from --hf-model "
            f"({config.model.hf_model}); name the folder there, or point --load at a checkpoint."
        )
    if is_portable(path):
        check_portable(path, config.model, padded_vocab_size, config.checkpoint.change_rope)
        return
    saved = Config.from_dict(read_json(path / "config.json"))
    mismatch = describe_mismatch(saved.model, config.model, config.checkpoint.change_rope)
    if mismatch:
        raise CheckpointError(
            f"the checkpoint {path} is of another model: {mismatch}; pass the flags it was trained with "
            f"(they are in {path / 'config.json'}), or point --load elsewhere."
        )
    check_adapters(path, saved.adapters, config)
    written, own = Layout(**read_json(path / "layout.json")), Layout.of(config, num_ranks, padded_vocab_size)
    if written.padded_vocab_size != own.padded_vocab_size:
        raise CheckpointError(
            f"the checkpoint {path} has {written.padded_vocab_size} rows in its embedding, and the tokenizer and "
            f"--make-vocab-size-divisible-by ask for {own.padded_vocab_size}; use the tokenizer it was trained with."
        )
    weights_alone = config.checkpoint.finetune or config.checkpoint.no_load_optim
    if not weights_alone and not loads_any_layout(path, config) and written.partitioning != own.partitioning:
        raise CheckpointError(
            f"the checkpoint {path} was written with {written.partitioning}, and this run has {own.partitioning}; "
            "add --universal-checkpoint, or start it as it was written."
        )


def other_bits(path: Path, config: Config) -> list[str]:
    """Describe why a run that resumes from `path` ends with other bits than one that was never interrupted.

    Empty unless the checkpoint or this run is in deterministic mode.
    """
    if config.checkpoint.finetune or is_portable(path):
        return []
    saved = Config.from_dict(read_json(path / "config.json"))
    names = [name for name in ORDER_OF_SUMS if value_of(saved, name) != value_of(config, name)]
    if not names or not (saved.training.deterministic_mode or config.training.deterministic_mode):
        return []
    before, now = (listed([_setting(each, name) for name in names], "and") for each in (saved, config))
    return [
        f"the checkpoint {path} was written {before}, and this run is {now}: its bits will differ from those of a run "
        "that was never interrupted"
    ]


def _setting(config: Config, name: str) -> str:
    return f"without {flag(name)}" if value_of(config, name) is False else f"with {shown(config, name)}"


def loads_any_layout(path: Path, config: Config) -> bool:
    """Return whether any layout can be loaded: the flags ask for it, or the form of the files depends on no layout."""
    return config.checkpoint.universal_checkpoint or is_layout_free(path)
