"""One model under DeepSpeed: construction, forward, backward, step, save and load.

DeepSpeed is configured as if all ranks, sequence-parallel and data-parallel, were data parallel: it averages gradients
over all of them. A rank's loss is its share of

    loss = (sum of token losses over all ranks) / (count of unmasked tokens over all ranks)

so the engine multiplies the share by the number of ranks before the backward pass. The mean over ranks is then the
exact gradient at every ZeRO stage. Checkpoints and universal checkpoints do not depend on sequence parallelism.
(DeepSpeed 0.19.8's own sequence parallelism scales ZeRO-3 gradients by 1/sp, or does not reduce them over sp at all.)
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from megatron.config import OptimizerConfig
from megatron.core.ranges import named_range
from megatron.engine.adam import build_adam
from megatron.engine.checkpoint_files import DurableWriter, SafeReader
from megatron.engine.state_loading import clear_padding, load_state
from megatron.weights.deepspeed_checkpoint import PARAMETER_GROUPS, TIED_NAMES
from megatron.weights.parameters import owned_tensors, tied_names
from megatron.weights.source import StateSource

_WHOLE = (None, ZeroParamStatus.AVAILABLE)


class Engine:
    """A model, its gradients and its optimizer, partitioned according to the DeepSpeed configuration."""

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        leaf_modules: Sequence[type[nn.Module]],
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]],
        optimizer_config: OptimizerConfig,
        deepspeed_config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        """Build the model and pass it to DeepSpeed. Collective over all ranks.

        Under ZeRO-3, `leaf_modules` are gathered whole, once per forward and once per backward pass. Each needs an
        input that requires a gradient. DeepSpeed (0.19.8) treats the arrival of that gradient as the end of the
        module's backward pass; without it, DeepSpeed reduces the gradients before they exist.
        """
        settings = dict(deepspeed_config)
        zero = settings.get("zero_optimization", {})
        self.zero_stage = int(zero.get("stage", 0))
        on_host = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        # DeepSpeed calls collectives by deprecated names, and newer torch warns about it on every rank.
        warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
        # DeepSpeed uses its shared-memory all-reduce only for inference. On a machine without a GPU it would compile
        # for a minute, and leave 66 MB per rank in /dev/shm after every run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False)  # uses torch's process group
        # No dtype argument: it turns fp32 into bf16 on CPUs without fp16 (DeepSpeed 0.19.8). The settings name it.
        with deepspeed.zero.Init(config_dict_or_path=settings) if self.zero_stage == 3 else nullcontext():
            model = build_model()
        if self.zero_stage == 3:
            set_z3_leaf_modules(model, list(leaf_modules))
        groups = parameter_groups(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._group_names = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
        optimizer = build_adam(groups, optimizer_config, device, on_host)
        if on_host and isinstance(optimizer, torch.optim.AdamW):
            settings["zero_force_ds_cpu_optimizer"] = False
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        if hasattr(self._engine.optimizer, "fp32_partitioned_groups_flat"):
            clear_padding(self._engine.optimizer)
        self._world_size = dist.get_world_size()
        is_fp32 = all(parameter.dtype == torch.float32 for group in groups for parameter in group["params"])
        self._measures_norm = self.zero_stage == 0 and is_fp32
        self._gradient_norm: Tensor | None = None

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._engine.module

    def train_step(
        self,
        batches: Iterable[Sequence[Any]],
        num_tokens: Tensor,
        learning_rate: float,
        before_step: Callable[[Tensor], object] = lambda loss: None,
    ) -> Tensor:
        """Run forward, backward and step over this rank's micro-batches; return the sum of its losses, on the device.

        Collective over all ranks. `num_tokens`, above 0, counts the unmasked tokens of the whole step over all ranks.
        `before_step` is called with the result when all gradients are ready, before the weights change; if it raises,
        they do not change.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros_like(num_tokens, dtype=torch.float32)
        for batch in batches:
            with named_range("forward"):
                loss = self._engine(*batch)
            # DeepSpeed's hooks and the streamed blocks run in one thread, in one order, on every rank.
            with torch.autograd.set_multithreading_enabled(False), named_range("backward"):
                self._engine.backward(loss * (self._world_size / num_tokens), scale_wrt_gas=False)
            total += loss.detach()
            if self._engine.is_gradient_accumulation_boundary():
                self._measure_norm()
                before_step(total)
            with named_range("optimizer"):
                self._engine.step()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Sequence[Any]) -> Tensor:
        """Return the sum of this rank's token losses. Collective over all ranks."""
        self._engine.eval()
        return self._engine(*batch).float()

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step overflowed and left the parameters unchanged."""
        return not self._engine.was_step_applied()

    @property
    def loss_scale(self) -> float:
        """The loss scale of fp16 training; 1 for other number formats."""
        return float(getattr(self._engine.optimizer, "cur_scale", 1.0))

    def gradient_norm(self) -> float | None:
        """Return the norm of the last step's whole gradient, before clipping."""
        norm = self._gradient_norm if self._measures_norm else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def weights_not_finite(self) -> list[str]:
        """Return the names of parameters with values on this rank that are not finite. Synchronizes with the device."""
        numbers = ((name, p) for name, p in self.module.named_parameters() if p.is_floating_point())
        shards = {name: _local_shard(parameter) for name, parameter in numbers}
        device = get_accelerator().current_device_name()  # some shards may be offloaded
        norms = [torch.linalg.vector_norm(weights, dtype=torch.float32).to(device) for weights in shards.values()]
        are_finite = torch.stack(norms).isfinite().tolist()
        return [name for name, is_finite in zip(shards, are_finite, strict=True) if not is_finite]

    def held_bytes(self) -> dict[tuple[str, str], int]:
        """Return the bytes of this rank's weights, gradients and optimizer states by (kind, device type)."""
        parameters = list(self.module.parameters())
        weights = [p.data for p in parameters]
        shards = [getattr(p, "ds_tensor", None) for p in parameters]
        weights += [shard for shard in shards if shard is not None]
        inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        # DeepSpeed's fp32 weights are in the groups, and at stage 3 only among the states.
        optimized = [*inner.state, *(p for group in inner.param_groups for p in group["params"])]
        own = [p for p in optimized if not any(p is parameter for parameter in parameters)]
        states = own + [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor)]
        gradients = [p.grad for p in parameters if p.grad is not None]
        totals: Counter[tuple[str, str]] = Counter()
        seen: set[int] = set()
        for what, tensors in (("weights", weights), ("gradients", gradients), ("optimizer states", states)):
            for storage in (tensor.untyped_storage() for tensor in tensors):
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    totals[what, storage.device.type] += storage.nbytes()
        return {key: num_bytes for key, num_bytes in totals.items() if num_bytes}

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters, and the buffers that checkpoints hold, once each; partitioned ones as they are."""
        return {**owned_tensors(self.module), **dict(self.module.named_parameters())}

    def save(self, folder: Path, tag: str, with_frozen: bool = True) -> list[Path]:
        """Write weights and optimizer states to the existing folder/tag. Collective over all ranks.

        Frozen parameters are left out if not `with_frozen`.
        Returns the files that this rank wrote, flushed to disk. Raises this rank's first error after all ranks are
        done.
        """
        writer = DurableWriter(self._engine.checkpoint_engine.zipfile_serialization)
        self._engine.checkpoint_engine = writer
        self._engine._copy_recovery_script = lambda _: writer.attempt(lambda: self._copy_scripts(folder / tag, writer))
        if not with_frozen:  # DeepSpeed (0.19.8) would leave in the other names of tied ones
            self._engine.module_state_dict = self._state_without_frozen
        self._engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state=self._parameter_names(),
            save_latest=False,
            exclude_frozen_parameters=not with_frozen,
        )
        writer.attempt(lambda: self._add_offloaded_files(folder / tag, writer))
        return writer.finish()

    def _state_without_frozen(self, **_: Any) -> dict[str, Any]:
        every = self.module.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in every if not parameter.requires_grad}
        return {name: value for name, value in self.module.state_dict().items() if name not in frozen}

    def _copy_scripts(self, checkpoint: Path, writer: DurableWriter) -> None:
        """Copy DeepSpeed's consolidation scripts into the checkpoint, so that they appear together with the weights."""
        DeepSpeedEngine._copy_recovery_script(self._engine, str(checkpoint))
        for script in checkpoint.glob("zero_to_*.py"):
            writer.add(script)

    def _add_offloaded_files(self, checkpoint: Path, writer: DurableWriter) -> None:
        """Record this rank's optimizer-state files on NVMe, which DeepSpeed copies itself."""
        for path in (checkpoint / "offloaded_tensors" / f"rank{dist.get_rank():02d}").rglob("*"):
            if path.is_file():
                writer.add(path)

    @property
    def states_are_on_nvme(self) -> bool:
        """Whether DeepSpeed swaps the optimizer states to NVMe, where only DeepSpeed can read and write them."""
        return bool(getattr(self._engine.optimizer, "swap_optimizer", False))

    def load_as_written(self, folder: Path, tag: str) -> None:
        """Load weights and optimizer states saved in exactly this layout, with DeepSpeed's loader.

        Collective over all ranks. ValueError if nothing is found; WeightsError for a file that names an unknown class,
        whose code is not executed. Use this only for states on NVMe: DeepSpeed takes the Adam constants and the order
        of the flat tensors from the files, whatever the settings say. Without the optimizer states, DeepSpeed (0.19.8)
        at stage 3 reads the checkpoint that `latest` names, whatever the tag, and all of it on each rank.
        """
        self._engine.checkpoint_engine = SafeReader(self._engine.checkpoint_engine.zipfile_serialization)
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise ValueError(f"DeepSpeed found no checkpoint {tag} in {folder}")

    def load_state(self, source: StateSource, with_optimizer: bool) -> None:
        """Load weights, and optimizer states if asked, from any layout.

        Collective over all ranks. WeightsError if they belong to another model, or if states are asked for and absent.
        """
        load_state(self._engine, self.zero_stage, source, with_optimizer)

    def _parameter_names(self) -> dict[str, Any]:
        """Return what DeepSpeed's files lack at stage 0: the names of the optimizer states and of tied weights."""
        return {PARAMETER_GROUPS: self._group_names, TIED_NAMES: tied_names(self.module)}

    def _measure_norm(self) -> None:
        """Compute the norm from the averaged gradients in fp32 without ZeRO, where DeepSpeed does not report it."""
        if self._measures_norm:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._gradient_norm = torch.nn.utils.get_total_norm(gradients)


def _local_shard(parameter: Any) -> Tensor:
    """Return this rank's part of a parameter: its shard without the padding at the end, or the whole parameter."""
    whole: Tensor = parameter.detach()
    if not hasattr(parameter, "ds_tensor"):
        return whole
    shard: Tensor = parameter.ds_tensor.detach().flatten()
    before = dist.get_rank(parameter.ds_process_group) * shard.numel()
    return shard[: max(0, parameter.ds_numel - before)]


@contextmanager
def whole_parameters(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gather parameters within a block, independently of DeepSpeed's own order of gathering.

    Collective over all ranks. Only the tensors behind the parameters are replaced, and restored afterwards.
    DeepSpeed's own gathering follows its recorded order of modules; an extra gather in between would break it.
    """
    partitioned = [p for p in parameters if getattr(p, "ds_status", None) not in _WHOLE]
    shards = [p.data for p in partitioned]
    try:
        for parameter in partitioned:
            parameter.data = _gathered(parameter)
        yield
    finally:
        for parameter, shard in zip(partitioned, shards, strict=True):
            parameter.data = shard


def _gathered(parameter: Any) -> Tensor:
    """Gather a parameter that ZeRO-3 has partitioned."""
    shard = parameter.ds_tensor.to(get_accelerator().current_device_name())
    group = parameter.ds_process_group
    whole = shard.new_empty(shard.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(whole, shard, group=group)
    return whole[: parameter.ds_numel].view(parameter.ds_shape)
