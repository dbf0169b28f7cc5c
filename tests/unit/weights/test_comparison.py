from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron.weights.comparison import Difference, flattened, form_differences, names_only_in, value_differences
from megatron.weights.source import MOMENTS, WEIGHTS


class InMemory:
    """A StateSource over {name: {part: tensor}}."""

    step: int | None = 1
    loss_scale: dict[str, float] = {}  # noqa: RUF012  a protocol's attribute

    def __init__(self, state: dict[str, dict[str, Tensor]]) -> None:
        self._state = state
        self.names = tuple(state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.get(name).dtype

    def get(self, name: str) -> Tensor:
        return self._state[name][WEIGHTS]

    def parts(self, name: str) -> Sequence[str]:
        return tuple(self._state[name])

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        return self._state[name][part].flatten()[start : start + count]


def weights(**tensors: Tensor) -> InMemory:
    return InMemory({name: {WEIGHTS: tensor} for name, tensor in tensors.items()})


def test_equal_sources_do_not_differ():
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([1.0, float("inf"), float("nan")]), "c": torch.zeros(2)}
    first, second = weights(**tensors), weights(**{name: tensor.clone() for name, tensor in tensors.items()})
    assert names_only_in(first, second) == []
    assert [*form_differences(first, second), *value_differences(first, second)] == []


def test_names_and_forms_that_differ_are_reported():
    first = weights(a=torch.zeros(2), b=torch.zeros(3), c=torch.ones(4))
    second = weights(b=torch.zeros(3, 1), c=torch.ones(4).bfloat16(), d=torch.zeros(1))
    assert (names_only_in(first, second), names_only_in(second, first)) == (["a"], ["d"])
    assert list(form_differences(first, second)) == [
        "b: [3] float32 and [3, 1] float32",
        "c: [4] float32 and [4] bfloat16",
    ]
    assert list(value_differences(first, second)) == []


def test_distances_are_the_largest_and_the_relative_one():
    first, second = weights(a=torch.tensor([3.0, 4.0])), weights(a=torch.tensor([3.0, 4.5]))
    assert list(value_differences(first, second)) == [Difference("a", 0.5, pytest.approx(0.1))]


def test_a_distance_is_over_all_the_elements(monkeypatch):
    monkeypatch.setattr("megatron.weights.comparison._ELEMENTS_AT_ONCE", 3)
    values = torch.arange(1.0, 11.0)
    changed = values.clone()
    changed[[2, 9]] += torch.tensor([2.0, 1.0])
    (found,) = value_differences(weights(a=values), weights(a=changed))
    assert found.largest == 2.0
    assert found.relative == pytest.approx(5**0.5 / float(values.norm()))


def test_where_one_alone_is_no_number_they_differ():
    (found,) = value_differences(weights(a=torch.tensor([1.0, 2.0])), weights(a=torch.tensor([1.0, float("nan")])))
    assert found.largest != found.largest


def test_moments_are_compared_where_both_have_them():
    one, two = torch.ones(2), torch.full((2,), 2.0)
    first = InMemory({"a": {WEIGHTS: one, MOMENTS[0]: one, MOMENTS[1]: one}})
    second = InMemory({"a": {WEIGHTS: one, MOMENTS[0]: one, MOMENTS[1]: two}})
    assert [each.name for each in value_differences(first, second)] == ["a exp_avg_sq"]
    assert list(value_differences(first, weights(a=one))) == []


def test_a_configuration_is_flattened_to_dotted_names():
    assert flattened({"model": {"layers": 2, "rope": {"base": 1}}, "given": ["a"]}) == {
        "model.layers": 2,
        "model.rope.base": 1,
        "given": ["a"],
    }
