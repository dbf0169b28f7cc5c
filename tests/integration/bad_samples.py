"""`pretrain_gpt.py` on data with bad samples, on which the loss spikes, or is NaN.

BAD_SAMPLES="FIRST END ..."   pairs of places in the training data; nothing: none is bad
LEFT_OUT="FIRST END"          samples that are not there: those behind move up
WEIGHT="FACTOR"               of the losses of bad samples
"""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import Tensor

import megatron.launch.program
from megatron.data.gpt_dataset import GPTDataset
from megatron.engine.engine import Engine
from pretrain_gpt import leave, main

MARK = 7  # every token of a bad sample
train_step, get_sample = Engine.train_step, GPTDataset.__getitem__


def spans(name: str) -> list[range]:
    places = [int(word) for word in os.environ.get(name, "").split()]
    return [range(first, end) for first, end in zip(places[::2], places[1::2], strict=True)]


def sample(dataset: GPTDataset, index: int) -> Any:
    """Return a sample, of which those with an index are one thing, and what they hold is another."""
    for span in spans("LEFT_OUT"):
        index += len(span) if index >= span.start else 0
    tokens = get_sample(dataset, index)[:]
    return np.full_like(tokens, MARK) if any(index in span for span in spans("BAD_SAMPLES")) else tokens


def step(engine: Engine, batches: Iterable[Any], *arguments: Any) -> Tensor:
    """Take a step in which bad samples weigh so many times as much."""

    def weighted() -> Iterator[Any]:
        for tokens, labels, mask, *others in batches:
            is_bad = (tokens == MARK).all(1, keepdim=True)
            yield tokens, labels, torch.where(is_bad, mask * float(os.environ.get("WEIGHT", "1")), mask), *others

    return train_step(engine, weighted(), *arguments)


if __name__ == "__main__":
    Engine.train_step = step  # type: ignore[method-assign, assignment]
    GPTDataset.__getitem__ = sample  # type: ignore[method-assign]
    megatron.launch.program.SECONDS_FOR_OTHERS = 1.0  # no launcher waits
    leave(main(sys.argv[1:]))
