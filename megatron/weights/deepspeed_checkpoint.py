"""Reader of DeepSpeed ZeRO checkpoints, one tensor at a time, without DeepSpeed and without a process group.

Contents of a checkpoint of N ranks:

| stage | mp_rank_00_model_states.pt    | zero_pp_rank_R_mp_rank_00_optim_states.pt, R < N                            |
|-------|-------------------------------|-----------------------------------------------------------------------------|
| 0     | weights, optimizer            |                                                                             |
| 1, 2  | weights in the number format  | per group one flat fp32 tensor and its moments: the parameters one after    |
|       | of training, shapes           | another in the order of the shapes, with the paddings listed in             |
|       |                               | `param_alignment_paddings`, cut into N runs                                 |
| 3     | zero_pp_rank_R_... instead:   | per group one flat fp32 tensor and its moments: the R-th of N equal parts   |
|       | shapes, frozen parameters     | of each parameter, the last part padded, one parameter after another        |

So a parameter is a list of runs of elements in the ranks' flat tensors, in order. DeepSpeed (0.19.8) also records where
its parameters are, in `param_slice_mappings`. That record is wrong with `round_robin_gradients`, so it is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from megatron.weights.errors import WeightsError
from megatron.weights.source import MOMENTS, WEIGHTS
from megatron.weights.torch_files import MappedFiles, loss_scale_state, read_torch_file

Keys = tuple[str | int, ...]

_OPTIMIZER_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_WHOLE_MODEL_FILE = "mp_rank_00_model_states.pt"
_PARTITIONED_MODEL_FILE = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
# Engine.save adds these to DeepSpeed's files: names in the order of the optimizer's groups, and {tied name: name}.
PARAMETER_GROUPS = "parameter_groups"
TIED_NAMES = "tied_names"


@dataclass(frozen=True)
class _Run:
    """`count` elements of a parameter: from element `start` of a tensor in `file`, found by the keys `places[part]`."""

    file: Path
    start: int
    count: int
    places: Mapping[str, Keys]


@dataclass
class _Parameter:
    """A parameter and its runs, in order; `dtype` is that of its weights."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    runs: list[_Run] = field(default_factory=list)


def is_deepspeed_checkpoint(path: Path) -> bool:
    """Return whether a folder holds DeepSpeed's files."""
    return any(path.glob("*mp_rank_00_model_states.pt"))


def open_deepspeed_checkpoint(path: str | Path) -> DeepSpeedCheckpoint:
    """Open a folder global_stepN; WeightsError if it is not DeepSpeed's, or a rank's file is missing or damaged."""
    path = Path(path)
    if not is_deepspeed_checkpoint(path):
        raise WeightsError(f"{path} holds no checkpoint of DeepSpeed (*mp_rank_00_model_states.pt); name one.")
    return DeepSpeedCheckpoint(path)


class DeepSpeedCheckpoint:
    """A StateSource over one checkpoint of any ZeRO stage and number of ranks; `aliases` are the names of tied weights.

    `get` returns the fp32 master weights, `module_weights` the weights that the model computed with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = MappedFiles()
        optimizer_files = _optimizer_files(path)
        self.num_ranks = len(optimizer_files) or None
        whole = (path / _WHOLE_MODEL_FILE).is_file()
        self._model_file = path / (_WHOLE_MODEL_FILE if whole else _PARTITIONED_MODEL_FILE.format(0))
        model = read_torch_file(self._model_file)
        self.aliases: dict[str, str] = dict(model.get(TIED_NAMES) or model.get("shared_params") or {})
        if not optimizer_files:
            self.zero_stage = 0
            optimizer = model.get("optimizer") if PARAMETER_GROUPS in model else None
            self._parameters = _unpartitioned(self._model_file, model)
            self.loss_scale: Mapping[str, float] = {}
        else:
            states = read_torch_file(optimizer_files[0])["optimizer_state_dict"]
            self.zero_stage = int(states.get("zero_stage", 1))  # DeepSpeed's BF16_Optimizer does not record it
            _check_ranks(path, states["partition_count"], len(optimizer_files))
            if self.zero_stage == 3:
                self._parameters = _partitioned_one_by_one(path, optimizer_files, model)
                optimizer = states["optimizer_state_dict"]
            else:
                self._parameters = _partitioned_as_groups(path, optimizer_files, model)
                optimizer = states["base_optimizer_state"]
                if isinstance(optimizer, list):  # "elastic" checkpoints store apex's step count separately
                    group = {"step": states.get("base_optimizer_state_step")}
                    optimizer = {"state": dict(enumerate(optimizer)), "param_groups": [group]}
            self.loss_scale = loss_scale_state(states.get("loss_scaler"))
        trained = set(self._parameters)
        self._parameters |= _untrained(self._model_file, model, trained | set(self.aliases))
        self.step = _step(optimizer)

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter and buffer once, sorted."""
        return tuple(sorted(self._parameters))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, without reading it."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of `get`'s result: fp32 for trained parameters."""
        return self._find(name).dtype

    def get(self, name: str) -> Tensor:
        """Read the whole master weights of a parameter, on the CPU."""
        parameter = self._find(name)
        return self.read(name, WEIGHTS, 0, Size(parameter.shape).numel()).view(parameter.shape)

    def module_weights(self, name: str) -> Tensor:
        """Read the weights the model computed with, in its number format; WeightsError at stage 3, which lacks them."""
        if self.zero_stage == 3:
            raise WeightsError(f"{self.path} is of ZeRO stage 3, which saves the fp32 weights alone; take these.")
        num_bytes = 4 * Size(self.shape(name)).numel()
        weights: Tensor = self._files.content(self._model_file, num_bytes)["module"][name]
        return weights.detach().clone()

    def parts(self, name: str) -> tuple[str, ...]:
        """List the stored parts of a parameter: the weights, and the moments unless it was frozen."""
        return tuple(next((run.places for run in self._find(name).runs), (WEIGHTS,)))

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        """Read elements [start, start + count) of the flattened weights ("fp32") or a moment; [count], on the CPU."""
        parameter = self._find(name)
        out = torch.empty(count, dtype=parameter.dtype if part == WEIGHTS else torch.float32)
        position = 0  # of the run's first element in the parameter
        for run in parameter.runs:
            first, last = max(start, position), min(start + count, position + run.count)
            if first < last:
                content = self._files.content(run.file, (last - first) * out.element_size())
                flat = _at(content, self._place(name, run, part)).detach().view(-1)
                out[first - start : last - start] = flat[run.start + first - position : run.start + last - position]
            position += run.count
        return out

    def _place(self, name: str, run: _Run, part: str) -> Keys:
        if part not in run.places:
            raise WeightsError(f"{run.file} does not identify the optimizer state of {name!r}; take the weights alone.")
        return run.places[part]

    def _find(self, name: str) -> _Parameter:
        if name not in self._parameters:
            raise WeightsError(f"{self.path} has no parameter {name!r}; use a checkpoint of this model.")
        return self._parameters[name]


def _optimizer_files(path: Path) -> list[Path]:
    """Return the ranks' files, sorted by rank; WeightsError if the model was split by tensor parallelism."""
    found = {}
    for file in path.iterdir():
        if match := _OPTIMIZER_FILE.search(file.name):
            if int(match[2]):
                raise WeightsError(f"{file} is of a model split by tensor parallelism; only whole models can be read.")
            found[int(match[1])] = file
    return [found[rank] for rank in sorted(found)]


def _check_ranks(path: Path, partition_count: int | Sequence[int], num_files: int) -> None:
    num_ranks = partition_count if isinstance(partition_count, int) else max(partition_count)
    if num_ranks != num_files:
        raise WeightsError(
            f"{path} was written by {num_ranks} ranks and has the optimizer states of {num_files}; copy all of them."
        )


def _unpartitioned(file: Path, model: Mapping[str, Any]) -> dict[str, _Parameter]:
    """Locate the parameters of stage 0: weights by name, and moments by position in the optimizer's groups."""
    groups: Sequence[Sequence[str]] = model.get(PARAMETER_GROUPS) or ()
    positions = {name: position for position, name in enumerate(name for group in groups for name in group)}
    parameters = {}
    for name in positions or model["module"]:
        weight = model["module"][name]
        places: dict[str, Keys] = {WEIGHTS: ("module", name)}
        if name in positions:
            places |= {moment: ("optimizer", "state", positions[name], moment) for moment in MOMENTS}
        parameters[name] = _whole(file, weight, places)
    return parameters


def _partitioned_as_groups(path: Path, files: Sequence[Path], model: Mapping[str, Any]) -> dict[str, _Parameter]:
    """Locate the parameters of stages 1 and 2. WeightsError where the shapes do not fill the flat tensors."""
    states = [read_torch_file(file)["optimizer_state_dict"] for file in files]
    is_elastic = isinstance(states[0]["base_optimizer_state"], list)
    moments: Keys = ("base_optimizer_state",) if is_elastic else ("base_optimizer_state", "state")
    parameters: dict[str, _Parameter] = {}
    for group, shapes in enumerate(model["param_shapes"]):
        lengths = [state["single_partition_of_fp32_groups"][group].numel() for state in states]
        paddings = (states[0].get("param_alignment_paddings") or {group: [0] * len(shapes)})[group]
        places = _places("single_partition_of_fp32_groups", moments, group)
        offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            numel = Size(shape).numel()
            parameters[name] = _Parameter(tuple(shape), runs=list(_cut_runs(files, lengths, offset, numel, places)))
            offset += numel + padding
        alignment = 2 * len(files)  # of the flat tensor, whose padding some versions save
        if -(-offset // alignment) != -(-sum(lengths) // alignment):
            raise WeightsError(
                f"{path} has {sum(lengths)} fp32 weights in group {group} where its shapes need {offset}; "
                "copy the whole checkpoint again."
            )
    return parameters


def _cut_runs(
    files: Sequence[Path], lengths: Sequence[int], offset: int, numel: int, places: Mapping[str, Keys]
) -> Iterator[_Run]:
    """Yield the runs of elements [offset, offset + numel) of a flat tensor cut into `lengths`, one per file."""
    first = 0  # of the file's elements in the flat tensor
    for file, length in zip(files, lengths, strict=True):
        start, end = max(offset, first), min(offset + numel, first + length)
        if start < end:
            yield _Run(file, start - first, end - start, places)
        first += length


def _partitioned_one_by_one(path: Path, files: Sequence[Path], model: Mapping[str, Any]) -> dict[str, _Parameter]:
    """Locate the parameters of stage 3. DeepSpeed stores frozen ones, partitioned the same way, next to the shapes."""
    parameters: dict[str, _Parameter] = {}
    for group, shapes in enumerate(model["param_shapes"]):
        places = _places("fp32_flat_groups", ("optimizer_state_dict", "state"), group)
        offset = 0
        for name, shape in shapes.items():
            parameters[name] = _Parameter(tuple(shape))
            length = -(-Size(shape).numel() // len(files))
            parameters[name].runs += _equal_runs(files, Size(shape).numel(), offset, places)
            offset += length
    fragments = model.get("frozen_param_fragments") or {}
    model_files = [path / _PARTITIONED_MODEL_FILE.format(rank) for rank in range(len(files))]
    for name, shape in (model.get("frozen_param_shapes") or {}).items():
        places = {WEIGHTS: ("frozen_param_fragments", name)}
        runs = _equal_runs(model_files, Size(shape).numel(), 0, places)
        parameters[name] = _Parameter(tuple(shape), fragments[name].dtype, list(runs))
    return parameters


def _equal_runs(files: Sequence[Path], numel: int, offset: int, places: Mapping[str, Keys]) -> Iterator[_Run]:
    """Yield the runs of a parameter that is cut into equal parts, one per file."""
    length = -(-numel // len(files))
    for rank, file in enumerate(files):
        if (count := min(length, numel - rank * length)) > 0:
            yield _Run(file, offset, count, places)


def _untrained(file: Path, model: Mapping[str, Any], known: set[str]) -> dict[str, _Parameter]:
    """Locate buffers and, below stage 3, frozen parameters: whole in the module. Stage 3 leaves the others empty."""
    return {
        name: _whole(file, tensor, {WEIGHTS: ("module", name)})
        for name, tensor in model["module"].items()
        if name not in known and isinstance(tensor, Tensor) and tensor.numel()
    }


def _whole(file: Path, tensor: Tensor, places: Mapping[str, Keys]) -> _Parameter:
    return _Parameter(tuple(tensor.shape), tensor.dtype, [_Run(file, 0, tensor.numel(), places)])


def _places(weights: str, moments: Keys, group: int) -> dict[str, Keys]:
    top = "optimizer_state_dict"
    return {WEIGHTS: (top, weights, group), **{moment: (top, *moments, group, moment) for moment in MOMENTS}}


def _at(content: Any, keys: Keys) -> Any:
    return reduce(lambda value, key: value[key], keys, content)


def _step(optimizer: Any) -> int | None:
    """Read Adam's step count from the state of a parameter, or from the group (apex); None if there is none."""
    if optimizer is None:
        return None
    states, group = optimizer.get("state"), (optimizer.get("param_groups") or [{}])[0]
    step = states[0].get("step", group.get("step")) if states else None
    return None if step is None else int(step)
