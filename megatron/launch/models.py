"""The model of a run: a native GPT or LLaMA, or the one in a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from megatron.config import AdaptersConfig, Config, HuggingFaceModelConfig
from megatron.engine.engine import whole_parameters
from megatron.fpdt.observer import Observer
from megatron.initialize import Context
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from megatron.model.transformer import LanguageModelHead, TokenEmbedding, TransformerLayer
from megatron.weights.published_config import has_weights


class ModelSource(NamedTuple):
    """How a run's model is built, which of its modules ZeRO-3 gathers whole, and how its experts run, if it has any."""

    provide: Callable[[Observer], nn.Module]
    leaf_modules: Sequence[type[nn.Module]]
    experts: str = ""


def model_source(config: Config, context: Context, padded_vocab_size: int, execution: Execution) -> ModelSource:
    """Return the source of the model that a configuration describes."""
    execution = replace(execution, whole_parameters=whole_parameters)
    initialization = Initialization(context.dtype, context.device, config.training.seed)
    if isinstance(config.model, HuggingFaceModelConfig):
        return _hugging_face_model(config.model, config.adapters, context, execution, initialization)

    def provide(observer: Observer) -> nn.Module:
        how = replace(execution, observer=observer)
        return build_model(config.model, padded_vocab_size, context.parallel_state, how, initialization)

    return ModelSource(provide, [TokenEmbedding, TransformerLayer, LanguageModelHead])


def _hugging_face_model(
    model: HuggingFaceModelConfig,
    adapters: AdaptersConfig,
    context: Context,
    execution: Execution,
    initialization: Initialization,
) -> ModelSource:
    # These import transformers, which native models do not need.
    from megatron.hf.building import build_hugging_face_model
    from megatron.hf.experts import describe_experts
    from megatron.hf.fixed_rope import fix_rope
    from megatron.hf.materialization import empty_model, materialize
    from megatron.hf.model import UNITS
    from megatron.hf.settings import transformers_config

    # Before ZeRO-3 has changed how tensors are created: buffers such as RoPE's frequencies keep their number format.
    empty = empty_model(transformers_config(model), context.dtype)
    fix_rope(empty, model.seq_length)
    if adapters.is_used:
        from megatron.hf.adapters import add_adapters  # imports peft

        add_adapters(empty, adapters)
    if adapters.quantize_base is not None:
        from megatron.hf.quantization import quantize_base  # imports peft

        quantize_base(empty)

    def provide(observer: Observer) -> nn.Module:
        materialize(empty, initialization, random=not has_weights(Path(model.hf_model or "")))
        how = replace(execution, observer=observer)
        return build_hugging_face_model(empty, context.parallel_state, how, model.attention_backend)

    return ModelSource(provide, UNITS, describe_experts(empty, context.device, context.dtype))
