#!/usr/bin/env python3
"""Pretrain GPT or LLaMA: read the arguments, say how model, batches and datasets are made, and train.

deepspeed --num_gpus 4 pretrain_gpt.py --help
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from torch import nn

from megatron.arguments import parse_args
from megatron.batch import Batch, EndOfDocument, Tokens, slice_batch
from megatron.checkpointing import CheckpointError
from megatron.config import Config, ConfigError, validate
from megatron.core.sequence_layout import SequenceLayout
from megatron.data.blended_dataset import SampleDataset
from megatron.data.errors import DataError
from megatron.data.gpt_dataset import build_dataset, build_datasets
from megatron.execution import choose_execution
from megatron.fpdt.host_pool import HostMemoryError
from megatron.fpdt.stream import ProgressReport
from megatron.initialize import Context, device_type, initialize, world_from_environment
from megatron.model.builder import build_model
from megatron.model.transformer import LanguageModelHead, TokenEmbedding, TransformerLayer
from megatron.ops.attention import AttentionUnavailable
from megatron.preflight import Vocabulary, check_inputs
from megatron.tokenizer import TokenizerError
from megatron.training import Datasets, pretrain
from megatron.weights.errors import WeightsError

USER_ERRORS = (
    ConfigError,
    DataError,
    TokenizerError,
    CheckpointError,
    WeightsError,
    HostMemoryError,
    AttentionUnavailable,
)
SECONDS_FOR_RANK_0 = 10.0


def main(argv: Sequence[str]) -> int:
    """Run; returns the exit code. What the user can mend is one line on rank 0, before anything is allocated."""
    rank, world_size = world_from_environment()
    try:
        config = parse_args(argv)
        validate(config, world_size, device_type())
        vocabulary = check_inputs(config, world_size)
        train(config, initialize(config), vocabulary)
    except USER_ERRORS as error:
        return report(error, rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def report(error: Exception, rank: int) -> int:
    """Write the error once: other ranks leave time for rank 0 to write it and for the launcher to end them."""
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    sys.stderr.write(f"error: {error}\n" if rank == 0 else f"error on rank {rank}: {error}\n")
    return 2


def train(config: Config, context: Context, vocabulary: Vocabulary) -> None:
    """Provide the model, the batches and the datasets, and train."""
    data, padded_vocab_size = config.data, vocabulary.padded_size
    parallel_state, execution = context.parallel_state, choose_execution(config, context, padded_vocab_size)
    end_of_document = EndOfDocument(
        vocabulary.end_of_document, data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss
    )
    seq_length = config.model.seq_length
    chunk_length = min(execution.chunk_size, seq_length) if execution.fpdt else seq_length
    layout = SequenceLayout(seq_length, chunk_length, parallel_state.sequence_parallel_size)

    def provide_model(report: ProgressReport) -> nn.Module:
        return build_model(
            config.model,
            padded_vocab_size,
            parallel_state,
            execution,
            context.dtype,
            context.device,
            config.training.seed,
            report,
        )

    def provide_batch(samples: Sequence[Tokens]) -> Batch:
        return slice_batch(
            [end_of_document.sample(tokens) for tokens in samples],
            layout,
            parallel_state.sequence_parallel_rank,
            pin=context.device.type == "cuda",
            restart_positions=data.reset_position_ids,
            separate_documents=data.reset_attention_mask,
        )

    def provide_datasets(num_samples: tuple[int, int, int]) -> Datasets:
        return datasets(config, num_samples, padded_vocab_size)

    leaf_modules = [TokenEmbedding, TransformerLayer, LanguageModelHead]
    pretrain(config, context, padded_vocab_size, leaf_modules, provide_model, provide_batch, provide_datasets)


def datasets(config: Config, num_samples: tuple[int, int, int], vocab_size: int) -> Datasets:
    """Training, validation and test data: parts of one dataset, or a dataset each."""
    data, seed, seq_length = config.data, config.training.seed, config.model.seq_length
    cache = Path(data.data_cache_path) if data.data_cache_path else None
    if data.data_path:
        return build_datasets(data.data_path, data.split, num_samples, seq_length, seed, cache, vocab_size)

    def part(paths: Sequence[str], name: str, count: int) -> SampleDataset | None:
        return build_dataset(paths, name, count, seq_length, seed, cache, vocab_size) if paths and count else None

    names = ("train", "valid", "test")
    paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
    train_data, valid_data, test_data = (part(*each) for each in zip(paths, names, num_samples, strict=True))
    return train_data, valid_data, test_data


def leave(code: int) -> NoReturn:
    """End the process without tearing the interpreter down.

    A communication thread may still be letting go of a tensor, which takes an interpreter that is whole: without one
    it aborts, and a run that is over and saved would end with an error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
