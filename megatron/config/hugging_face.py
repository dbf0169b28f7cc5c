"""Settings of a model that the folder of --hf-model describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.model import ModelConfig
from megatron.config.sizes import ModelSizes

# What of a config.json says nothing about the model: where it came from, how it is stored, and how it generates text.
_NOT_OF_THE_MODEL = frozenset(
    (
        *("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"),
        *("quantization_config", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "router_aux_loss_coef"),  # of training
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type"),
    )
)
_ROPE = frozenset(("rope_parameters", "rope_scaling", "rope_theta"))


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModelConfig(ModelConfig):
    """The settings of --hf-model, filled in from the folder (megatron.hf.settings).

    Of the architecture's flags only sizes are set, and whether positions are learned; others, such as `swiglu`, say
    nothing about the model.
    """

    hf_config: Mapping[str, Any] = field(hash=False)
    """The content of config.json with the defaults of its class, and with the dropout of the run."""

    embedding_rows: int
    """Rows of the word embedding: the vocabulary is not padded."""

    counted: ModelSizes
    """The sizes, as they were read off the model."""

    @property
    def sizes(self) -> ModelSizes:
        return self.counted

    @property
    def model_type(self) -> str:
        """The name that transformers has for the architecture."""
        return str(self.hf_config["model_type"])

    def resolved(self) -> HuggingFaceModelConfig:
        return self

    def num_rows(self, vocab_size: int) -> int:
        return self.embedding_rows

    def difference(self, saved: HuggingFaceModelConfig, change_rope: bool) -> str:
        """Return what differs in the model of a checkpoint, with a remedy if there is one, or ""."""
        names = self._differing(saved)
        if change_rope:
            names = [name for name in names if name not in _ROPE]
        difference = "; ".join(
            f'"{name}" is {saved.hf_config[name]!r} in the checkpoint and {self.hf_config[name]!r} in --hf-model'
            for name in names
        )
        only_rope = bool(names) and _ROPE.issuperset(names)
        return difference + ("; add --change-rope to continue training with the RoPE of --hf-model" * only_rope)

    def _differing(self, saved: HuggingFaceModelConfig) -> list[str]:
        """Return the keys of config.json that differ. One that only one has is of another version of transformers.

        Dropout may differ, and the number of positions where they are not learned, as between runs of flags.
        """
        free = _NOT_OF_THE_MODEL
        if self.use_rotary_position_embeddings:
            free |= {"max_position_embeddings"}
        both = (name for name in self.hf_config if name in saved.hf_config)
        return [
            name
            for name in both
            if name not in free and "drop" not in name and saved.hf_config[name] != self.hf_config[name]
        ]
