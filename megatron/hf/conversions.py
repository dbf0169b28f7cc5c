"""The steps between the tensors of a Hugging Face folder and those of the transformers model, by its own conversions.

    folder: experts.0.gate_proj.weight, experts.0.up_proj.weight, experts.1 ...      model: experts.gate_up_proj

A plan is a list of conversions. Each takes a few tensors to a few others, and needs no tensor of another one. Plans are
made from names and shapes: transformers' operations run on tensors without storage. They follow transformers' loop of
loading (`convert_and_load_state_dict_in_model`) and of saving (`revert_weight_conversion`), which hold all tensors.

A stack of experts is converted one expert at a time where every operation keeps experts apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Size, Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    PrefixChange,
    SplitModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from megatron.weights.errors import WeightsError, first_line

Read = Callable[[str, int, int], Tensor]
"""Reads elements [start, start + count) of a named tensor, flat."""

# Dequantization in blocks within one expert; named, as their modules import kernels.
_DEQUANTIZATIONS = ("Fp8Dequantize", "Mxfp4Dequantize")


class Forms(Protocol):
    """Tensors by name, of which shape and dtype are asked."""

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...


@dataclass(frozen=True)
class EmptyTensors:
    """Tensors without storage as Forms."""

    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


@dataclass
class Conversion:
    """Some tensors that become others together: `sources` by the pattern that each list of names matches."""

    key: str
    model: PreTrainedModel
    transform: WeightConverter | None
    """None where tensors only get another name."""

    renamings: Sequence[WeightRenaming]
    """Renamings of the results."""

    sources: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the sources."""

    targets: dict[str, Tensor] = field(default_factory=dict)
    """The results, without storage."""

    num_experts: int = 1
    """Parts that can be converted one by one; 1 where the conversion needs all of its sources."""

    splits: bool = False
    """Whether each expert becomes tensors of its own."""

    @property
    def source_names(self) -> list[str]:
        """Names of all sources."""
        return [name for names in self.sources.values() for name in names]

    def plan(self, forms: Forms) -> None:
        """Work out the results; WeightsError where the sources do not fit each other."""
        self.shapes = {name: forms.shape(name) for name in self.source_names}
        empty = {name: torch.empty(forms.shape(name), dtype=forms.dtype(name), device="meta") for name in self.shapes}
        try:
            self.targets = self._convert(lambda names: [empty[name] for name in names])
        except Exception as error:  # the operations raise whatever torch does
            raise WeightsError(
                f"{_listed(self.source_names)} cannot be converted to {self.key!r} ({first_line(error)})"
            ) from error
        self.num_experts, self.splits = _parts(self)

    def results(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Yield the converted tensors by name, those of experts one expert at a time."""
        if not self.splits:
            yield from self._convert_whole(read).items()
            return
        for expert in range(self.num_experts):
            names = list(self.targets)[expert :: self.num_experts]
            yield from zip(names, self._convert_expert(expert, read), strict=True)

    def read(self, name: str, start: int, count: int, read: Read) -> Tensor:
        """Return elements [start, start + count) of one result, flat, from no more sources than they need."""
        if self.transform is None:
            return read(self.source_names[0], start, count)
        if self.splits:
            place, expert = divmod(list(self.targets).index(name), self.num_experts)
            return self._convert_expert(expert, read)[place].flatten()[start : start + count].clone()
        if self.num_experts == 1:
            return self._convert_whole(read)[name].flatten()[start : start + count].clone()
        out = torch.empty(count, dtype=self.targets[name].dtype)
        size = self.targets[name].numel() // self.num_experts
        for expert in range(start // size, -(-(start + count) // size)):
            (tensor,) = self._convert_expert(expert, read)
            first, last = max(start, expert * size), min(start + count, (expert + 1) * size)
            out[first - start : last - start] = tensor.flatten()[first - expert * size : last - expert * size]
        return out

    def _convert_whole(self, read: Read) -> dict[str, Tensor]:
        def whole(name: str) -> Tensor:
            return read(name, 0, Size(self.shapes[name]).numel()).view(self.shapes[name])

        return self._convert(lambda names: list(map(whole, names)))

    def _convert_expert(self, expert: int, read: Read) -> list[Tensor]:
        """Convert one expert's part: of a list of tensors one, of a stack one row, with a first dimension of 1."""

        def part(names: Sequence[str]) -> Tensor:
            if len(names) > 1:
                shape = self.shapes[names[expert]]
                return read(names[expert], 0, Size(shape).numel()).view(shape)
            rest = self.shapes[names[0]][1:]
            return read(names[0], expert * Size(rest).numel(), Size(rest).numel()).view(1, *rest)

        return list(self._convert(lambda names: [part(names)]).values())

    @torch.no_grad()
    def _convert(self, collect: Callable[[Sequence[str]], list[Tensor]]) -> dict[str, Tensor]:
        """Run transformers' operations on what `collect` gives for the names of each pattern; return new names."""
        if self.transform is None:
            (tensor,) = collect(self.source_names)
            return {self.key: tensor}
        for pattern, names in self.sources.items():  # without other references: the operations free the tensors early
            self.transform.collected_tensors[pattern] = cast(Any, collect(names))
        results = self.transform.convert(self.key, model=self.model, config=self.model.config)
        return {
            _renamed(name, self.renamings): tensor[0] if isinstance(tensor, list) else tensor
            for name, tensor in results.items()
        }


def plan_loading(
    model: PreTrainedModel, forms: Forms, transforms: Sequence[WeightTransform]
) -> tuple[list[Conversion], list[str]]:
    """Plan the way from the tensors of a folder to those of the model; return also the names that nothing takes.

    WeightsError for tensors that do not fit each other.
    """
    expected = model.state_dict()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = _by_pattern(converters)
    conversions: dict[str, Conversion] = {}
    surplus = []
    for name in sorted(forms.names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if target not in expected:
            surplus.append(name)
            continue
        transform = None if pattern is None else by_pattern[pattern]
        conversion = conversions.setdefault(target, Conversion(target, model, transform, ()))
        conversion.sources.setdefault(pattern or name, []).append(name)
    for conversion in conversions.values():
        conversion.plan(forms)
    return list(conversions.values()), surplus


def plan_saving(model: PreTrainedModel, forms: Forms) -> list[Conversion]:
    """Plan the way from the model's tensors to those that `save_pretrained` of a model built here writes."""
    # Without prefixes, as transformers does: whether the folder that the model came from had them is not known.
    transforms = [
        transform.reverse_transform()
        for transform in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if not isinstance(transform, PrefixChange)
    ]
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = _by_pattern(converters)
    conversions: dict[str, Conversion] = {}
    for name in sorted(forms.names, key=dot_natural_key):
        key, pattern = rename_source_key(name, [], converters)
        if pattern is None:
            key, transform, after = _renamed(name, renamings), None, []
        else:
            transform, after = by_pattern[pattern], renamings
        conversion = conversions.setdefault(key, Conversion(key, model, transform, after))
        conversion.sources.setdefault(pattern or name, []).append(name)
    for conversion in conversions.values():
        conversion.plan(forms)
    return list(conversions.values())


def _renamed(name: str, renamings: Sequence[WeightRenaming]) -> str:
    return rename_source_key(name, list(renamings), [])[0]


def _by_pattern(converters: Iterable[WeightConverter]) -> dict[str, WeightConverter]:
    return {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _parts(conversion: Conversion) -> tuple[int, bool]:
    """Return how many experts a conversion can take one by one, and whether each becomes tensors of its own."""
    lists, whole = list(conversion.sources.values()), (1, False)
    if conversion.transform is None:
        return whole
    operations = conversion.transform.operations
    splits = isinstance(operations[-1], SplitModulelist) and operations[-1].dim == 0
    if not all(map(_keeps_experts_apart, operations[:-1] if splits else operations)):
        return whole
    if any(len(names) > 1 for names in lists):
        counts, is_stack = {len(names) for names in lists}, _merges_first(operations)
    else:
        shapes = [conversion.shapes[names[0]] for names in lists]
        counts = {shape[0] if shape else 1 for shape in shapes}
        is_stack = min(map(len, shapes)) > 2 and not any(isinstance(each, MergeModulelist) for each in operations)
    count, *others = counts
    targets = list(conversion.targets.values())
    fits = len(targets) % count == 0 if splits else len(targets) == 1 and targets[0].shape[:1] == (count,)
    return (count, splits) if is_stack and fits and not others else whole


def _merges_first(operations: Sequence[Any]) -> bool:
    """Return whether lists of experts are stacked before anything but dequantization."""
    first = next((each for each in operations if type(each).__name__ not in _DEQUANTIZATIONS), None)
    return isinstance(first, MergeModulelist) and first.dim == 0


def _keeps_experts_apart(operation: Any) -> bool:
    """Return whether rows of the first dimension of an operation's result depend on the same rows of its sources."""
    match operation:
        case MergeModulelist():
            return operation.dim == 0
        case Chunk() | Concatenate():
            return operation.dim > 0 and operation.num_shards_attribute is None
        case Interleave():
            return operation.dim > 0
        case Transpose():
            return operation.dim0 > 0 and operation.dim1 > 0 and not operation.check_dims
        case _:
            return type(operation).__name__ in _DEQUANTIZATIONS


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
