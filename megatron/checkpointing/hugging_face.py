"""The folder that a run of a Hugging Face model writes at its end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpointing.agreement import on_all_ranks, on_first_rank
from megatron.config import AdaptersConfig
from megatron.engine.engine import Engine, whole_parameters
from megatron.hf.conversions import EmptyTensors
from megatron.hf.export import Export, Target
from megatron.weights.errors import raise_if_no_room
from megatron.weights.hugging_face import ReportingWriter
from megatron.weights.parameters import whole_shape


def save_hugging_face(engine: Engine, published: Mapping[str, Any], folder: Path, beside: Path) -> None:
    """Write a folder that `from_pretrained` loads, with the tokenizer in `beside`. Collective over all ranks.

    One parameter after another is gathered in the number format of training; rank 0 converts and writes it.

    CheckpointError on every rank if the weights are of another model, the folder exists, or rank 0 cannot write it:
    nothing is left of it then.
    """
    tensors, target = engine.weights(), Target(folder, beside=(beside,))
    forms = EmptyTensors(
        {name: torch.empty(whole_shape(each), dtype=each.dtype, device="meta") for name, each in tensors.items()}
    )
    plans: list[Export] = []
    on_all_ranks(lambda: plans.append(Export(published, forms)))

    def read(name: str, start: int, count: int) -> Tensor:
        return tensors[name].detach().reshape(-1)[start : start + count].cpu()

    writers: list[ReportingWriter] = []  # rank 0's
    failures: list[Exception] = []
    with ExitStack() as stack:
        on_first_rank(lambda: writers.append(stack.enter_context(plans[0].open(target))))
        for conversion in plans[0].conversions:
            with whole_parameters(tensors[name] for name in conversion.source_names):
                try:
                    if writers and not failures:
                        plans[0].add(conversion, read, writers[0])
                except Exception as error:  # the other ranks wait in the next collective
                    failures.append(error)
        on_first_rank(lambda: _raise_first(failures, folder))
        on_first_rank(stack.close)


def save_adapters(
    engine: Engine, settings: AdaptersConfig, published: Mapping[str, Any], base: Path, folder: Path
) -> None:
    """Write the adapters as peft's folder, or the model of `base` with the adapters merged. Collective over all ranks.

    CheckpointError on every rank if the folder exists, or rank 0 cannot write it.
    """
    from megatron.hf.adapter_export import write_trained  # imports peft, which runs without adapters do not need

    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with whole_parameters([parameter]):
                if dist.get_rank() == 0:
                    tensors[name] = parameter.detach().cpu().clone()
    on_first_rank(lambda: write_trained(tensors, settings, published, base, folder))


def _raise_first(failures: list[Exception], folder: Path) -> None:
    for failure in failures:
        raise_if_no_room(failure, folder)
        raise failure
