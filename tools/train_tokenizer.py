"""Train a byte-level BPE on text and write it in GPT-2's format, vocab.json and merges.txt.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output-dir tokenizer

The vocabulary holds the 256 bytes, the merges, and <|endoftext|> as its last id.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron.data.atomic_file import atomic_path
from megatron.data.errors import DataError
from megatron.data.text_files import INPUT_FORMATS, find_inputs, read_documents
from megatron.tokenizer.gpt2_bpe import END_OF_DOCUMENT
from megatron.tokenizer.text import valid_unicode

SMALLEST_VOCABULARY = 257


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True,
                        help="files, folders or quoted patterns; .gz and .zst are unpacked")  # fmt: skip
    parser.add_argument("--input-format", choices=INPUT_FORMATS, default="auto",
                        help="text: each file is a document; auto: .parquet is Parquet, the rest jsonl")  # fmt: skip
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts to learn from")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, <|endoftext|> included")
    parser.add_argument("--min-frequency", type=int, default=2, help="how often a pair must occur to be merged")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for vocab.json and merges.txt")
    arguments = parser.parse_args(argv)
    if arguments.vocab_size < SMALLEST_VOCABULARY:
        parser.error(
            f"--vocab-size ({arguments.vocab_size}) must be {SMALLEST_VOCABULARY} or more, the 256 bytes and "
            f"{END_OF_DOCUMENT}; use for example 8192."
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        paths = find_inputs(arguments.input, arguments.input_format)
        texts = read_texts(paths, arguments.input_format, arguments.json_keys)
        vocab, merges = train(texts, arguments.vocab_size, arguments.min_frequency)
        write(vocab, merges, arguments.output_dir)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output_dir}: {len(vocab)} ids, {len(merges)} merges")
    if len(vocab) < arguments.vocab_size:
        print(f"note: the text has no pairs left to merge for --vocab-size {arguments.vocab_size}", file=sys.stderr)
    return 0


def read_texts(paths: Sequence[Path], input_format: str, keys: Sequence[str]) -> Iterator[str]:
    for texts, _ in read_documents(paths, input_format, keys):
        yield from map(valid_unicode, texts)


def train(texts: Iterator[str], vocab_size: int, min_frequency: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn token ids and merges, the most frequent pair first; the last id is the end of a document."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    vocab[END_OF_DOCUMENT] = len(vocab)
    return vocab, [(left, right) for left, right in model["merges"]]


def write(vocab: dict[str, int], merges: Sequence[tuple[str, str]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "vocab.json") as path:
        path.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    with atomic_path(folder / "merges.txt") as path:
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
