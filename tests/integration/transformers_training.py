"""A plain training loop over a transformers model, on the batches of a run of `pretrain_gpt.py`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from megatron.config import Config
from megatron.data.gpt_dataset import SampleSettings, build_datasets
from tests.unit.hf.published_models import loaded


def batches_of(config: Config) -> list[Tensor]:
    """The samples of a run's iterations, [batch, length + 1] each."""
    length, size = config.model.seq_length, config.training.global_batch_size
    assert size is not None
    assert config.training.train_iters is not None
    num_samples = config.training.train_iters * size
    settings = SampleSettings(length, config.training.seed)
    data, _, _ = build_datasets(config.data.data_path, config.data.split, (num_samples, 0, 0), settings)
    assert data is not None
    samples = [torch.from_numpy(data[number][0 : length + 1].astype(np.int64)) for number in range(num_samples)]
    return list(torch.stack(samples).split(size))


def losses_of_transformers(folder: Path, batches: Sequence[Tensor], lr: float) -> list[float]:
    """Train the model in a folder in fp32, one step per batch, with the other defaults of `pretrain_gpt.py`."""
    model = loaded(folder, dtype=torch.float32)
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    optimizer = AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr)
    losses = []
    for tokens in batches:
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
