"""Names and shapes of a model's parameters, taken from the model itself, without memory for any of them."""

from __future__ import annotations

from typing import cast

import torch

from megatron.config import ModelConfig
from megatron.model.initialization import Initializer
from megatron.model.transformer import GPTModel, ModelExecution
from megatron.weights.errors import WeightsError

# Modules whose rows are tokens, and which the padding of the vocabulary therefore lengthens.
TOKEN_ROWS = ("embedding.word_embeddings.weight", "head.output_layer.weight")


def parameter_shapes(model: ModelConfig, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its name, in the model's order; a tied output layer is not one of its own.

    WeightsError if a tensor of such sizes cannot exist.
    """
    initializer = Initializer(torch.Generator(), torch.float32, torch.device("meta"), 0.0, 0.0)
    never_executed = cast(ModelExecution, None)
    try:
        built = GPTModel(model, padded_vocab_size, initializer, never_executed)
    except RuntimeError as error:  # without memory there is nothing else that could fail
        raise WeightsError("the sizes in config.json make tensors too large to exist; use the model's own.") from error
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
