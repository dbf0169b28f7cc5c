"""Names and shapes of a model's parameters, taken from the model itself without allocating any of them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.model.initialization import Initializer
from megatron.model.transformer import GPTModel, ModelExecution
from megatron.weights.errors import WeightsError

# Weights with one row per token; padding the vocabulary adds rows to them.
TOKEN_ROWS = ("embedding.word_embeddings.weight", "head.output_layer.weight")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the other names of tied parameters, each with the name of the owner."""
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: owners[id(parameter)] for name, parameter in every if owners[id(parameter)] != name}


def owned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the buffers that a state dict holds, once each, by the owner's name."""
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state dict holds, by name."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in owned_tensors(model).items() if name not in parameters}


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, which ZeRO-3 may have partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_shapes(model: ModelConfig, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the model's order, without a tied output layer.

    WeightsError if tensors of these sizes cannot exist.
    """
    initializer = Initializer(torch.Generator(), torch.float32, torch.device("meta"), 0.0, 0.0)
    never_executed = cast(ModelExecution, None)
    try:
        built = GPTModel(model, padded_vocab_size, initializer, never_executed)
    except RuntimeError as error:  # nothing is allocated, so only the size itself can fail
        raise WeightsError("the sizes in config.json make tensors too large to exist; use the model's own.") from error
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
