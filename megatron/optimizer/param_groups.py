"""Parameter groups: which parameters weight decay applies to.

Weight decay applies to matrices, embeddings included. It does not apply to biases and to the gain and shift of a
normalization, which do not benefit from it.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into a group that decays and one that does not.

    Parameters in a group follow the order of the modules, which is the same on every rank. A tied parameter appears
    once, under the first module that owns it. An empty group is left out: DeepSpeed cannot flatten one.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for module, name, parameter in _owned_parameters(model):
        (decayed if _decays(module, name, parameter) else undecayed).append(parameter)
    groups = [
        {"name": "decay", "params": decayed, "weight_decay": weight_decay},
        {"name": "no_decay", "params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _owned_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield (owning module, name in it, parameter) for each trainable parameter, once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name, parameter


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if name == "bias" or name.endswith("_bias"):
        return False
    if "norm" in type(module).__name__.lower():
        return False
    return _num_dimensions(parameter) > 1


def _num_dimensions(parameter: nn.Parameter) -> int:
    """Return the number of dimensions of the full parameter: ZeRO-3 leaves an empty vector, with shape `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
