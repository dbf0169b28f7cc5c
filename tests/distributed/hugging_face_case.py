"""Tiny transformers models in real DeepSpeed engines: loaded from a folder, written as a folder and a checkpoint."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from megatron.checkpointing import CheckpointError
from megatron.checkpointing.hugging_face import save_hugging_face
from megatron.config import OptimizerConfig
from megatron.engine.engine import Engine
from megatron.hf.weights import folder_source
from megatron.optimizer.param_groups import parameter_groups
from megatron.weights.hugging_face import ReportingWriter
from megatron.weights.published_config import read_published_config
from tests.unit.hf.published_models import random_model

TAG = "global_step0"


@dataclass(frozen=True)
class Job:
    """A folder to load into an engine, and a folder in which `folder` and a checkpoint are written."""

    family: str
    zero_stage: int
    bf16: bool
    source: Path
    out: Path


def build(job: Job) -> Engine:
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    settings = {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": job.zero_stage, "stage3_param_persistence_threshold": 40},
        "bf16": {"enabled": job.bf16},
    }

    def build_model() -> nn.Module:
        with no_init_weights():  # initializing the row of a padding token needs a whole embedding
            model = random_model(job.family, torch.bfloat16 if job.bf16 else torch.float32)
        model.tie_weights()
        return model

    groups, config = (lambda model: parameter_groups(model, 0.1)), OptimizerConfig(lr=1e-2)
    return Engine(build_model, [nn.Embedding], groups, config, settings, torch.device("cpu"))


def load_and_write(jobs: list[Job]) -> list[list[str]]:
    """Return the errors of writing into a folder that exists, and on a disk that fills up, for each job."""
    errors = []
    for job in jobs:
        engine = build(job)
        engine.load_state(folder_source(job.source), with_optimizer=False)
        save_hugging_face(engine, read_published_config(job.source), job.out / "folder", beside=job.source)
        again = error_of_writing(engine, job, job.out / "folder")
        with patch.object(ReportingWriter, "add", fill_up):
            full = error_of_writing(engine, job, job.out / "full")
        errors.append([again, full])
        engine.save(job.out, TAG)
    return errors


def fill_up(writer: ReportingWriter, name: str, tensor: Tensor) -> None:
    if "layers.1" in name:
        raise OSError(errno.ENOSPC, "No space left on device")


def error_of_writing(engine: Engine, job: Job, folder: Path) -> str:
    try:
        save_hugging_face(engine, read_published_config(job.source), folder, beside=job.source)
    except CheckpointError as error:
        return str(error)
    return ""
