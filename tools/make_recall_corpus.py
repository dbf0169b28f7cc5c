#!/usr/bin/env python3
"""Write a recall dataset of token ids: a model that remembers the first mention of a key can predict its value.

    tools/make_recall_corpus.py --output-prefix data/recall --documents 20000 --length 128

Use NullTokenizer with the same --vocab-size, and --seq-length equal to the document length, so that every sample is one
document. --ends-every cuts documents into pieces that do not see each other in training with --reset-attention-mask: a
control that cannot remember.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argument_types import whole

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from megatron.arguments import token_count
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDatasetWriter, smallest_dtype
from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.recall import RecallVocabulary, recall_documents
from megatron.ranks.interrupts import run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-prefix", required=True, help="the files are PREFIX.bin and PREFIX.idx")
    parser.add_argument("--documents", type=whole(1, "10000"), default=10000, metavar="N", help="[%(default)s]")
    parser.add_argument("--length", type=token_count, default=128, metavar="TOKENS", help="of a document [%(default)s]")
    parser.add_argument(
        "--max-mentions", type=int, default=16, metavar="N", help="pairs in a document, from 2 to this [%(default)s]"
    )
    parser.add_argument("--ends-every", type=int, metavar="N", help="end a document at every Nth token too [no]")
    ids = RecallVocabulary()
    parser.add_argument("--vocab-size", type=int, default=ids.vocab_size, help="as NullTokenizer's [%(default)s]")
    parser.add_argument("--num-keys", type=int, default=ids.num_keys, help="ids that are keys [%(default)s]")
    parser.add_argument("--num-values", type=int, default=ids.num_values, help="ids that are values [%(default)s]")
    parser.add_argument("--seed", type=whole(0, "1234"), default=1234, help="[%(default)s]")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        write_corpus(arguments)
    except (EvaluationError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_corpus(arguments: argparse.Namespace) -> None:
    """Write the dataset that the arguments describe."""
    vocabulary = RecallVocabulary(arguments.vocab_size, arguments.num_keys, arguments.num_values)
    documents = recall_documents(
        vocabulary,
        arguments.documents,
        arguments.length,
        arguments.max_mentions,
        arguments.seed,
        arguments.ends_every,
    )
    prefix = Path(arguments.output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, smallest_dtype(vocabulary.vocab_size + 1)) as writer:
        for document in documents:
            writer.add_document(document)
    print(f"{prefix}: {writer.num_documents} documents of {arguments.length} tokens")


if __name__ == "__main__":
    sys.exit(run_tool(main))
