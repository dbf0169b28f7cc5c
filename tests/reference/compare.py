"""Compare gradients parameter by parameter, in relative norm."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.reference.reference_model import Architecture, group_count


def split_query_key_value(config: Architecture, weight: Tensor) -> dict[str, Tensor]:
    """Cut a fused query_key_value weight [G*(R+2)*D, h] into its three parts, so that none hides behind another."""
    groups = group_count(config)
    queries = config.num_attention_heads // groups
    rows = weight.view(groups, queries + 2, -1, weight.shape[-1])
    return {"query": rows[:, :queries], "key": rows[:, queries], "value": rows[:, queries + 1]}


def relative_errors(config: Architecture, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Return name -> |got - want| / |want| for every parameter, query, key and value weights apart.

    A fused bias stays whole: without rotary positions the key bias has no gradient, only rounding.

    Raises:
        AssertionError: a parameter is missing, unexpected, or of another shape.
    """
    assert set(got) == set(want), f"gradients differ in names: {sorted(set(got) ^ set(want))}"
    errors: dict[str, float] = {}
    for name, reference in want.items():
        assert got[name].shape == reference.shape, f"{name}: got {got[name].shape}, want {reference.shape}"
        if name.endswith("query_key_value.weight"):
            parts, references = (split_query_key_value(config, tensor) for tensor in (got[name], reference))
            errors |= {f"{name}[{part}]": _relative(parts[part], references[part]) for part in references}
        else:
            errors[name] = _relative(got[name], reference)
    return errors


def assert_gradients_equal(
    config: Architecture, got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float
) -> None:
    """Fail with the list of every parameter whose relative norm error is not below the tolerance."""
    wrong = {name: error for name, error in relative_errors(config, got, want).items() if not error < tolerance}
    listing = "\n".join(f"  {name}: {error:.2e}" for name, error in wrong.items())
    assert not wrong, f"{len(wrong)} gradients differ by {tolerance:.0e} or more (relative norm):\n{listing}"


def _relative(got: Tensor, want: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.double() - want) / torch.linalg.vector_norm(want))
