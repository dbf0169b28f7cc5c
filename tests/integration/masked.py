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
from megatron.training.data import Part, TrainingData
from pretrain_gpt import leave, main

make_batches = TrainingData._make_batches


def masked_batches(self: TrainingData, part: Part, samples: Iterator[list[int]]) -> Iterator[Batch]:
    masked = json.loads(os.environ["MASKED"]).get(part, [])
    numbers = list(samples)
    for (number,), batch in zip(numbers, make_batches(self, part, iter(numbers)), strict=True):
        is_masked = number in masked
        yield replace(batch, loss_mask=batch.loss_mask * 0, num_tokens=0) if is_masked else batch


if __name__ == "__main__":
    TrainingData._make_batches = masked_batches  # type: ignore[method-assign]
    leave(main(sys.argv[1:]))
