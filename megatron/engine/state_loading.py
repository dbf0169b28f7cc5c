"""Loading of weights and Adam's moments into DeepSpeed, from files of any layout, without a collective per tensor.

Each rank reads the elements that it owns into its fp32 master weights and moments. The weights that the model computes
with are cast from the masters once, at the end. DeepSpeed's own loader of universal checkpoints (0.19.8) cannot convert
from ZeRO 1 or 2 to 3 or back, as its converter writes a different format for each, and it does not support stage 0.

| stage | shard of a parameter that a rank owns, in fp32                                     |
|-------|------------------------------------------------------------------------------------|
| 0     | all of it; the master is the parameter                                             |
| 1, 2  | the run of it that is in the rank's part of the group's flat tensor, or none       |
| 3     | the rank-th of equal parts, one per rank, the last one padded                      |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.engine.adam import set_moments
from megatron.weights.errors import WeightsError
from megatron.weights.parameters import saved_buffers, whole_shape
from megatron.weights.source import MOMENTS, WEIGHTS, StateSource


@dataclass(frozen=True)
class _Shard:
    """Elements [start, start + count) of a parameter, stored in the flattened tensor `master` from `offset` on."""

    name: str
    start: int
    count: int
    master: Tensor
    offset: int

    def write(self, target: Tensor, values: Tensor) -> None:
        """Write the shard's elements into the master or into one of its moments."""
        target.detach().view(-1)[self.offset : self.offset + self.count].copy_(values)


def check_parameters(model: nn.Module, source: StateSource) -> None:
    """Raise WeightsError unless `source` has exactly the model's parameters and saved buffers, in their shapes.

    It may also have the other names of tied weights; these are not read.
    """
    owned = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    owned |= {name: tuple(buffer.shape) for name, buffer in saved_buffers(model).items()}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
    faults = [f"{name} is missing" for name in owned if name not in source.names]
    faults += [f"{name} is no parameter of the model" for name in source.names if name not in known]
    faults += [
        f"{name} is {list(source.shape(name))} where the model has {list(shape)}"
        for name, shape in owned.items()
        if name in source.names and source.shape(name) != shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightsError(
            f"these weights are not of this model: {'; '.join(faults[:3])}{more}; pass the flags and the tokenizer of "
            "the model that they are of, or point --load elsewhere."
        )


@torch.no_grad()
def load_state(engine: Any, zero_stage: int, source: StateSource, with_moments: bool) -> None:
    """Load weights into DeepSpeed's engine, and Adam's moments if asked. Collective over all ranks.

    Raises:
        WeightsError: names or shapes differ, moments are asked for and absent, or DeepSpeed stores the states
            in a way that is not known here.
    """
    check_parameters(engine.module, source)
    if with_moments and source.step is None:
        raise WeightsError("these are weights without optimizer states; add --finetune or --no-load-optim.")
    _refuse_unknown_optimizer(engine.optimizer, zero_stage)
    if zero_stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # no parameter stays gathered with its old values
    adam = engine.optimizer if zero_stage == 0 else engine.optimizer.optimizer
    masters = _masters(engine.optimizer, zero_stage)
    if with_moments:
        set_moments(adam, masters, source.step or 0)
    trained = {id(master) for master in masters}
    for shard in _shards(engine, zero_stage):
        shard.write(shard.master, source.read(shard.name, WEIGHTS, shard.start, shard.count))
        for moment in MOMENTS if with_moments and id(shard.master) in trained else ():
            values = source.read(shard.name, moment, shard.start, shard.count)
            shard.write(adam.state[shard.master][moment], values)
    _refresh_model(engine.optimizer, zero_stage)
    for name, buffer in saved_buffers(engine.module).items():
        buffer.copy_(source.get(name))
    if with_moments:
        _set_loss_scale(engine.optimizer, source.loss_scale)
        engine.global_steps = source.step  # DeepSpeed's monitors and profiler count from here
        engine.global_samples = engine.global_steps * engine.train_batch_size()


@torch.no_grad()
def clear_padding(optimizer: Any) -> None:
    """Zero the padding of ZeRO-3's masters, which DeepSpeed (0.19.8) does not initialize. Adam keeps it zero.

    Checkpoints contain it: without this, those of two runs with the same weights would differ.
    """
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            shard = _own_part("", parameter, master, offset)
            offset += _part_length(parameter)
            master[shard.offset + shard.count : offset].zero_()


def _masters(optimizer: Any, zero_stage: int) -> list[Tensor]:
    """Return the tensors that Adam updates."""
    if zero_stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return list(
        optimizer.fp32_partitioned_groups_flat if zero_stage == 3 else optimizer.single_partition_of_fp32_groups
    )


def _shards(engine: Any, zero_stage: int) -> Iterator[_Shard]:
    """Yield the shards that this rank owns. Frozen parameters have no master: they are written in place."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if zero_stage == 3:
        yield from _partitioned_one_by_one(engine.optimizer, names)
    elif zero_stage:
        yield from _partitioned_as_groups(engine.optimizer, names)
    for parameter in engine.module.parameters():
        if zero_stage == 0 or not parameter.requires_grad:
            name = names[id(parameter)]
            if zero_stage == 3:
                yield _own_part(name, parameter, parameter.ds_tensor, 0)
            else:
                yield _Shard(name, 0, parameter.numel(), parameter, 0)


def _partitioned_as_groups(optimizer: Any, names: Mapping[int, str]) -> Iterator[_Shard]:
    """Yield the shards of stages 1 and 2, in the order and at the offsets of the group's flat tensor.

    DeepSpeed's own `_hp_mapping` (0.19.8) uses the model's order, which is wrong with `round_robin_gradients`.
    """
    groups = zip(
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        optimizer.single_partition_of_fp32_groups,
        optimizer.real_dp_process_group,
        strict=True,
    )
    for parameters, offsets, master, process_group in groups:
        first = dist.get_rank(process_group) * master.numel()
        for parameter, offset in zip(parameters, offsets, strict=True):
            start, end = max(offset, first), min(offset + parameter.numel(), first + master.numel())
            if start < end:
                yield _Shard(names[id(parameter)], start - offset, end - start, master, start - first)


def _partitioned_one_by_one(optimizer: Any, names: Mapping[int, str]) -> Iterator[_Shard]:
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            yield _own_part(names[id(parameter)], parameter, master, offset)
            offset += _part_length(parameter)


def _own_part(name: str, parameter: Any, master: Tensor, offset: int) -> _Shard:
    """Return this rank's shard of a parameter that ZeRO-3 has partitioned; the last shards may be short or empty."""
    start = min(dist.get_rank(parameter.ds_process_group) * _part_length(parameter), parameter.ds_numel)
    count = min(_part_length(parameter), parameter.ds_numel - start)
    return _Shard(name, start, count, master, offset)


def _part_length(parameter: Any) -> int:
    return -(-int(parameter.ds_numel) // dist.get_world_size(parameter.ds_process_group))


def _refresh_model(optimizer: Any, zero_stage: int) -> None:
    """Update the weights that the model computes with from the fp32 masters. Collective over all ranks."""
    if zero_stage in (1, 2):
        optimizer.update_lp_params()
    elif zero_stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # small parameters stay gathered


def _set_loss_scale(optimizer: Any, state: Mapping[str, float]) -> None:
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None and getattr(scaler, "dynamic", False):
        for name, value in state.items():
            setattr(scaler, name, value)


def _refuse_unknown_optimizer(optimizer: Any, zero_stage: int) -> None:
    if getattr(optimizer, "swap_optimizer", False):
        raise WeightsError(
            "weights cannot be loaded into optimizer states on NVMe; use "
            '"offload_optimizer": {"device": "cpu"} in the DeepSpeed JSON.'
        )
    groups = "round_robin_bit16_groups"
    needed = {0: "state", 1: groups, 2: groups, 3: "fp32_partitioned_groups_flat"}
    if not hasattr(optimizer, needed[zero_stage]):
        raise WeightsError(
            f"weights cannot be loaded into DeepSpeed's {type(optimizer).__name__}; leave settings of the DeepSpeed "
            "JSON that choose it (data_types) out."
        )
