#!/usr/bin/env python3
"""Pretrain GPT or LLaMA on indexed datasets: the data checks and the source of samples.

deepspeed --num_gpus 4 pretrain_gpt.py --help
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # the imports below take seconds
    from megatron.launch.gpu_allocator import use_expandable_segments
    from megatron.ranks.interrupts import end_on_interrupt
    from megatron.ranks.repeated_warnings import show_repeated_warnings_once
    from megatron.ranks.supervisor import supervise

    end_on_interrupt()
    record_place = supervise()
    show_repeated_warnings_once(os.environ)
    use_expandable_segments(os.environ)

from megatron.config import Config, ConfigError, SampleLengths
from megatron.config.sample_lengths import Phase
from megatron.data.batch import EndOfDocument
from megatron.data.blended_dataset import SampleDataset
from megatron.data.gpt_dataset import SampleSettings, build_dataset, build_datasets
from megatron.launch.preflight import Vocabulary, check_indexed_data
from megatron.launch.program import SampleSource, leave, run
from megatron.tokenizer import Tokenizer
from megatron.training.providers import Datasets

FINETUNING_FLAGS = ("chat_template", "max_document_mb", "long_samples", "group_by_length")


def main(argv: Sequence[str], record_place: Callable[[str], object] | None = None) -> int:
    """Run and return the exit code. An error the user can fix is one line on rank 0, before anything is allocated."""
    return run(argv, check_data, provide_source, record_place=record_place)


def check_data(config: Config, tokenizer: Tokenizer) -> None:
    """Raise DataError for unusable datasets, and ConfigError for flags of fine-tuning."""
    for name in FINETUNING_FLAGS:
        if name in config.given:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect in pretrain_gpt.py; use finetune_llama.py, or remove {flag}")
    check_indexed_data(config, tokenizer)


def provide_source(config: Config, vocabulary: Vocabulary, lengths: SampleLengths) -> SampleSource:
    """Provide consecutive tokens of the datasets; flags determine the effect of an end of document."""
    data = config.data
    end_of_document = EndOfDocument(
        vocabulary.end_of_document, data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss
    )
    return SampleSource(
        lambda num_samples: datasets(config, num_samples, vocabulary.padded_size, lengths.phases),
        end_of_document.sample,
    )


def datasets(
    config: Config, num_samples: tuple[int, int, int], vocab_size: int, phases: tuple[Phase, ...] = ()
) -> Datasets:
    """Build the training, validation and test data: parts of one dataset, or one dataset each."""
    data = config.data
    cache = Path(data.data_cache_path) if data.data_cache_path else None
    settings = SampleSettings(config.model.seq_length, config.training.seed, cache, vocab_size, phases)
    if data.data_path:
        return build_datasets(data.data_path, data.split, num_samples, settings)

    def part(paths: Sequence[str], name: str, count: int) -> SampleDataset | None:
        return build_dataset(paths, name, count, settings) if paths and count else None

    names = ("train", "valid", "test")
    paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
    train_data, valid_data, test_data = (part(*each) for each in zip(paths, names, num_samples, strict=True))
    return train_data, valid_data, test_data


if __name__ == "__main__":
    leave(main(sys.argv[1:], record_place))
