"""Contents of a run that its entry point provides: the model, the datasets, and batches of their samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from megatron.data.batch import BatchProvider
from megatron.data.blended_dataset import SampleDataset
from megatron.fpdt.observer import Observer

Datasets = tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]
DatasetsProvider = Callable[[tuple[int, int, int]], Datasets]


@dataclass(frozen=True)
class Providers:
    """The model, datasets and batches of a run, each as a function that builds it.

    `datasets` takes the number of training, validation and test samples. Under ZeRO-3, `leaf_modules` are gathered
    whole.
    """

    model: Callable[[Observer], nn.Module]
    leaf_modules: Sequence[type[nn.Module]]
    datasets: DatasetsProvider
    batch: BatchProvider
