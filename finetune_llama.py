#!/usr/bin/env python3
"""Fine-tune a model on conversations, with the loss on the answers only: docs/finetuning.md.

deepspeed --num_gpus 4 finetune_llama.py --load weights/llama --data-path conversations.jsonl ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from megatron.data.batch import Sample
from megatron.data.errors import DataError
from megatron.data.saved_datasets import is_saved
from megatron.data.vocabulary import CheckedTokens
from megatron.finetuning.chat_template import find_template
from megatron.finetuning.packed_dataset import build_packed_datasets
from megatron.launch.preflight import Vocabulary, data_paths
from megatron.launch.program import SampleSource, leave, run
from megatron.tokenizer import Tokenizer, tokenizer_of


def main(argv: Sequence[str], record_place: Callable[[str], object] | None = None) -> int:
    """Run and return the exit code. An error the user can fix is one line on rank 0, before the model is allocated."""
    return run(argv, check_data, provide_source, separate_conversations, record_place)


def separate_conversations(config: Config) -> Config:
    """Separate conversations that share a sequence in attention, and restart positions at 0 for each."""
    return replace(config, data=replace(config.data, reset_position_ids=True, reset_attention_mask=True))


def check_data(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError or DataError for errors that are visible before the conversations are tokenized."""
    find_template(config.tokenizer, config.finetuning)
    if config.data.eod_mask_loss:
        raise ConfigError(
            "--eod-mask-loss is for pretrain_gpt.py; here the loss is on the answers and the tokens that end them; "
            "remove it"
        )
    if config.training.seq_length_schedule is not None:
        raise ConfigError(
            "--seq-length-schedule is for pretrain_gpt.py; here --group-by-length runs each step at the length of its "
            "conversations; remove --seq-length-schedule"
        )
    for path in (path for paths in data_paths(config) for path in paths):
        if not (os.path.isfile(path) or is_saved(Path(path))):
            raise DataError(
                f"{path} is no file, and no folder that save_to_disk of Hugging Face datasets wrote; give JSON lines, "
                "one JSON array, Parquet or such a folder."
            )


def provide_source(config: Config, vocabulary: Vocabulary, lengths: SampleLengths) -> SampleSource:
    """Provide conversations, several per sequence."""
    tokenizer = tokenizer_of(config.tokenizer)

    def within_vocabulary(sample: Sample) -> Sample:
        if tokenizer.vocab_size <= vocabulary.padded_size:
            return sample
        return replace(sample, tokens=CheckedTokens(sample.tokens, vocabulary.padded_size))

    return SampleSource(
        lambda num_samples: build_packed_datasets(config, tokenizer, num_samples, lengths.global_batch_size),
        within_vocabulary,
    )


if __name__ == "__main__":
    leave(main(sys.argv[1:], record_place))
