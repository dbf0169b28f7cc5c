"""`pretrain_gpt.py` in which no label counts of the samples that MASKED lists by part: {"train": [NUMBERS], ...}.

For micro-batches of one sample.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron.data.batch import Batch
from megatron.data.blended_dataset import SampleDataset
from megatron.training.loop import Training
from pretrain_gpt import leave, main

make_batches = Training._make_batches


def masked_batches(self: Training, data: SampleDataset | None, samples: Iterator[list[int]]) -> Iterator[Batch]:
    part = "train" if data is self._train_data else "validation" if data is self._valid_data else "test"
    masked = json.loads(os.environ["MASKED"]).get(part, [])
    numbers = list(samples)
    for (number,), batch in zip(numbers, make_batches(self, data, iter(numbers)), strict=True):
        is_masked = number in masked
        yield replace(batch, loss_mask=batch.loss_mask * 0, num_tokens=0) if is_masked else batch


if __name__ == "__main__":
    Training._make_batches = masked_batches  # type: ignore[method-assign]
    leave(main(sys.argv[1:]))
