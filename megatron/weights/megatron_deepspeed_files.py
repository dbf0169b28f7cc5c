"""Location of each tensor in the files of upstream's Megatron-DeepSpeed, by tensor-parallel rank R.

    mp_rank_R_model_states.pt                           without pipeline, below ZeRO-3: the weights
    layer_N-model_R-model_states.pt                     with pipeline: embedding, blocks, norm and head, by layer number
    zero_pp_rank_D_mp_rank_R_model_states.pt            ZeRO-3: the shapes, in the order of the flat tensors,
    [bf16_]zero_pp_rank_D_mp_rank_R_optim_states.pt     and the D-th of equal parts of each parameter's fp32 weights

Files are memory-mapped, and no code in a pickle is executed: a class that it names is replaced by an inert one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Size, Tensor

from megatron.weights.errors import WeightsError
from megatron.weights.torch_files import MappedFiles

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt$")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
# (upstream's names, ours), tried in order
_RENAMES = (
    (re.compile(r"^(module\.)+"), ""),
    (re.compile(r"^language_model\."), ""),
    (re.compile(r"^(encoder|transformer)\."), ""),
    (re.compile(r"^final_layernorm\."), "head.final_layernorm."),
    (re.compile(r"^output_layer\."), "head.output_layer."),
    (re.compile(r"(^layers\.\d+)\.attention\."), r"\1.self_attention."),
)
_COPIES = ("word_embeddings_for_head.", "inv_freq")  # a copy of the embedding; a computed buffer


class StoredTensor(Protocol):
    """A tensor in files, described and not yet read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, files: MappedFiles) -> Tensor:
        """Read the tensor into CPU memory of its own."""


@dataclass(frozen=True)
class _Whole:
    """A tensor in one file, under a dotted name."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, files: MappedFiles) -> Tensor:
        num_bytes = Size(self.shape).numel() * self.dtype.itemsize
        return dict(_tensors(files.content(self.file, num_bytes)))[self.key].clone()


@dataclass(frozen=True)
class _Partitioned:
    """A tensor cut into equal parts, the last one padded: one part per file, from element `start` of a flat tensor."""

    files: tuple[Path, ...]
    group: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def read(self, files: MappedFiles) -> Tensor:
        numel = Size(self.shape).numel()
        length = -(-numel // len(self.files))
        out = torch.empty(length * len(self.files))
        for rank, file in enumerate(self.files):
            flat = _flat_groups(files.content(file, 4 * length), file)[self.group]
            out[rank * length : (rank + 1) * length] = flat[self.start : self.start + length]
        return out[:numel].view(self.shape)


def main_file(path: Path) -> Path | None:
    """Return the file with upstream's arguments; None if the folder is not a checkpoint of upstream."""
    names = (_model_file(0), f"zero_pp_rank_0_{_model_file(0)}")
    return next((path / name for name in names if (path / name).is_file()), None)


def has_layer_files(path: Path) -> bool:
    """Return whether a folder holds a pipeline's layer files."""
    return any(path.glob("layer_*-model_*-model_states.pt"))


def find_places(path: Path, num_ranks: int) -> list[dict[str, StoredTensor]]:
    """Locate every tensor, by our name, for each tensor-parallel rank; WeightsError if a file is missing or damaged."""
    if has_layer_files(path):
        return [_of_layers(files) for files in _layer_files(path, num_ranks)]
    if (path / _model_file(0)).is_file():
        return [_of_model(_existing(path / _model_file(rank))) for rank in range(num_ranks)]
    return [_of_partitions(path, rank) for rank in range(num_ranks)]


def load(file: Path) -> Any:
    """Memory-map a torch.save file; WeightsError if it is damaged."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(type("Inert", (Inert,), {}), name) for name in names]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged file can raise many kinds of errors inside torch
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"{file} cannot be read ({lines[0]}); copy it again, or name another checkpoint.") from error


class Inert:
    """Stand-in for any class that a pickle names: it stores the attributes and does nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _model_file(rank: int) -> str:
    return f"mp_rank_{rank:02d}_model_states.pt"


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise WeightsError(f"{file} is not there; copy the files of all ranks.")
    return file


def _layer_files(path: Path, num_ranks: int) -> list[list[Path]]:
    """Return each rank's layer files, by layer number."""
    found: dict[int, dict[int, Path]] = {}
    for file in path.glob("layer_*-model_*-model_states.pt"):
        if match := _LAYER_FILE.search(file.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = file
    for number, files in sorted(found.items()):
        if set(files) != set(range(num_ranks)):
            raise WeightsError(
                f"{path} has layer {number} of the tensor-parallel ranks {sorted(files)}, and was written by "
                f"{num_ranks}; copy the files of all ranks, and of one checkpoint."
            )
    return [[found[number][rank] for number in sorted(found)] for rank in range(num_ranks)]


def _of_model(file: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of a model in one file, nested or flat."""
    places: dict[str, StoredTensor] = {}
    for key, tensor in _tensors({"module": load(file).get("module") or {}}):
        if not _is_copy(key):
            places[_our_name(key)] = _Whole(file, key, tuple(tensor.shape), tensor.dtype)
    return places


def _of_layers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Locate the tensors of a pipeline's layers; the kind of a layer is recognized by its tensors."""
    places: dict[str, StoredTensor] = {}
    num_blocks = 0
    for file in files:
        tensors = dict(_tensors(load(file)))
        rename = _renaming(tensors, num_blocks)
        num_blocks += _is_block(tensors)
        for key, tensor in tensors.items():
            if not _is_copy(key):
                places[rename(key)] = _Whole(file, key, tuple(tensor.shape), tensor.dtype)
    return places


def _of_partitions(path: Path, rank: int) -> dict[str, StoredTensor]:
    """Locate the tensors of ZeRO-3. The flat tensors are in the order of the shapes; no parameter spans two of them."""
    files = _optimizer_files(path, rank)
    model = load(_existing(path / f"zero_pp_rank_0_{_model_file(rank)}"))
    shapes = {name: tuple(shape) for group in model.get("param_shapes") or () for name, shape in group.items()}
    sizes = [flat.numel() for flat in _flat_groups(load(files[0]), files[0])]
    places: dict[str, StoredTensor] = {}
    group = start = 0
    for name, shape in shapes.items():
        length = -(-Size(shape).numel() // len(files))
        while group < len(sizes) and start == sizes[group]:
            group, start = group + 1, 0
        if group == len(sizes) or start + length > sizes[group]:
            break
        if not _is_copy(name):
            places[_our_name(name)] = _Partitioned(files, group, start, shape)
        start += length
    else:
        if sizes[group:] in ([], [start]):
            return places
    raise WeightsError(f"{files[0]} holds other sizes than the shapes beside it say; copy the files of one checkpoint.")


def _optimizer_files(path: Path, rank: int) -> tuple[Path, ...]:
    """Return the data-parallel ranks' files; WeightsError unless all are there."""
    found = {}
    for file in path.iterdir():
        if (match := _OPTIMIZER_FILE.fullmatch(file.name)) and int(match[2]) == rank:
            found[int(match[1])] = file
    _existing(found.get(0, path / f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt"))
    count = _optimizer_states(load(found[0]), found[0]).get("partition_count")
    if set(found) != set(range(count if isinstance(count, int) else len(found))):
        raise WeightsError(
            f"{path} was written by {count} data-parallel ranks and has the optimizer states of {len(found)}; copy all "
            "of them."
        )
    return tuple(found[rank] for rank in sorted(found))


def _optimizer_states(content: Any, file: Path) -> Mapping[str, Any]:
    states = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(states, dict):
        raise WeightsError(f"{file} has no optimizer_state_dict; copy it again.")
    return states


def _flat_groups(content: Any, file: Path) -> Sequence[Tensor]:
    groups = _optimizer_states(content, file).get("fp32_flat_groups")
    if not groups:
        raise WeightsError(f"{file} has no fp32_flat_groups, the weights of ZeRO-3; copy it again.")
    return [group.detach().view(-1) for group in groups]


def _our_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _is_copy(name: str) -> bool:
    return any(copy in name for copy in _COPIES)


def _is_block(tensors: Mapping[str, Tensor]) -> bool:
    return any(".query_key_value." in key for key in tensors)


def _renaming(tensors: Mapping[str, Tensor], num_blocks: int) -> Callable[[str], str]:
    """Return the map from the names in a layer's file to ours."""
    if _is_block(tensors):
        return lambda key: f"layers.{num_blocks}.{re.sub(r'^attention[.]', 'self_attention.', key)}"
    if "word_embeddings.weight" in tensors:
        return lambda key: f"embedding.{key}"
    if any(tensor.dim() == 2 for tensor in tensors.values()):
        return lambda key: f"head.output_layer.{key.removeprefix('lm_head.')}"
    return lambda key: f"head.final_layernorm.{key}"


def _tensors(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested mappings, each with its dotted name."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")
