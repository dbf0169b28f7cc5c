"""Training, validation and test data of a run: this rank's micro-batches, prefetched in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from megatron.config import Config, accumulation_steps
from megatron.data.batch import Batch
from megatron.data.blended_dataset import SampleDataset
from megatron.data.prefetch import Prefetcher
from megatron.data.samplers import BatchSampler
from megatron.data.splits import parse_split
from megatron.initialize import Context
from megatron.training.providers import Providers

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


class TrainingData:
    """The parts of the data; one may be absent."""

    def __init__(
        self, config: Config, context: Context, providers: Providers, num_samples: tuple[int, int, int]
    ) -> None:
        """Build the datasets, and warn of parts that have no data. Collective over all ranks."""
        self._config, self._context, self._providers = config, context, providers
        parallel = context.parallel_state
        self._sampler = BatchSampler(
            config.training.micro_batch_size,
            parallel.data_parallel_rank,
            parallel.data_parallel_size,
            accumulation_steps(config, parallel.world_size),
        )
        datasets = providers.datasets(num_samples)
        self._datasets: dict[Part, SampleDataset | None] = dict(zip(PARTS, datasets, strict=True))
        for part, share in zip(PARTS[1:], parse_split(config.data.split)[1:], strict=True):
            is_missed = self._datasets[part] is None and share and config.training.eval_iters
            if is_missed and context.is_first_rank:
                context.log.warning(
                    "there are no %s data: --split or --data-path leaves none, so none are evaluated", part
                )

    def has(self, part: Part) -> bool:
        """Return whether a part has data."""
        return self._datasets[part] is not None

    def extend_training(self, num_samples: int) -> None:
        """Build the training data again if they have fewer samples than this, after a rollback further than planned."""
        data = self._datasets["train"]
        if data is not None and len(data) < num_samples:
            self._datasets["train"], *_ = self._providers.datasets((num_samples, 0, 0))

    def read(self, part: Part, first_sample: int, num_steps: int) -> Prefetcher[Batch]:
        """Prefetch this rank's micro-batches of `num_steps` steps, in order."""
        last_sample = first_sample + num_steps * self._sampler.global_batch_size
        samples = self._sampler.microbatches(first_sample, last_sample)
        return Prefetcher(self._make_batches(part, samples), self._config.data.prefetch_microbatches)

    def _make_batches(self, part: Part, samples: Iterator[list[int]]) -> Iterator[Batch]:
        if self._context.device.type == "cuda":
            torch.cuda.set_device(self._context.device)  # a new thread pins memory through GPU 0 otherwise
        data = self._datasets[part]
        for indices in samples:
            assert data is not None, "a part that is read was asked for"
            yield self._providers.batch([data[i] for i in indices])
