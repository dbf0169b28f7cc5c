"""Train a tokenizer on text: a byte-level BPE, in the GPT-2 and Hugging Face formats, or a SentencePiece model.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output-dir tokenizer
    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output-dir tokenizer \\
        --tokenizer-type SentencePieceTokenizer

GPT-2's vocabulary holds the 256 bytes, the merges, and <|endoftext|> as its last id. It is written twice, with the same
ids: vocab.json and merges.txt for GPT2BPETokenizer, tokenizer.json and tokenizer_config.json for HFTokenizer and
transformers. The SentencePiece model, tokenizer.model, is a BPE that leaves text as it is, falls back to bytes for rare
characters, and ends documents with </s>. SentencePiece holds the text in memory while it trains: give it a part of a
large corpus.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron.core.atomic_file import atomic_path
from megatron.data.errors import DataError
from megatron.data.json_records import DEFAULT_MAX_DOCUMENT_MB
from megatron.data.output_names import check_output_name
from megatron.data.text_files import INPUT_FORMATS, find_inputs, read_documents
from megatron.ranks.interrupts import run_tool
from megatron.tokenizer import TokenizerError
from megatron.tokenizer.gpt2_bpe import END_OF_DOCUMENT, byte_level_bpe
from megatron.tokenizer.text import valid_unicode

SMALLEST_VOCABULARY = {"GPT2BPETokenizer": 257, "SentencePieceTokenizer": 258}
END_OF_DOCUMENT_OF = {"GPT2BPETokenizer": END_OF_DOCUMENT, "SentencePieceTokenizer": "<unk> and </s>"}
LONGEST_SENTENCE = 2**14  # characters; SentencePiece skips sentences above a number of bytes
LARGEST_CHARACTER = 4  # bytes
# Settings that transformers needs besides tokenizer.json.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_DOCUMENT,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True,
                        help="files, folders or quoted patterns; .gz and .zst are unpacked")  # fmt: skip
    parser.add_argument("--input-format", choices=INPUT_FORMATS, default="auto",
                        help="text: each file is a document; auto: .parquet is Parquet, the rest jsonl")  # fmt: skip
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts to train on")
    parser.add_argument("--max-document-mb", type=int, default=DEFAULT_MAX_DOCUMENT_MB,
                        help="maximum MiB of a line, row or text file [%(default)s]")  # fmt: skip
    parser.add_argument("--tokenizer-type", choices=SMALLEST_VOCABULARY, default="GPT2BPETokenizer",
                        help="type of the tokenizer [%(default)s]")  # fmt: skip
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, end-of-document id included")
    parser.add_argument("--min-frequency", type=int, help="how often a pair must occur to be merged in GPT-2's BPE [2]")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the tokenizer's files")
    arguments = parser.parse_args(argv)
    kind = arguments.tokenizer_type
    if arguments.vocab_size < SMALLEST_VOCABULARY[kind]:
        parser.error(
            f"--vocab-size ({arguments.vocab_size}) must be {SMALLEST_VOCABULARY[kind]} or more, the 256 bytes and "
            f"{END_OF_DOCUMENT_OF[kind]}; use for example 8192."
        )
    if arguments.min_frequency is not None and kind != "GPT2BPETokenizer":
        parser.error(f"--min-frequency ({arguments.min_frequency}) has no effect with {kind}; remove it.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        check_output_name(arguments.output_dir, "--output-dir")
        paths = find_inputs(arguments.input, arguments.input_format)
        texts = read_texts(paths, arguments.input_format, arguments.json_keys, arguments.max_document_mb)
        if arguments.tokenizer_type == "GPT2BPETokenizer":
            vocab, merges = train(texts, arguments.vocab_size, arguments.min_frequency or 2)
            write(vocab, merges, arguments.output_dir)
            write_hugging_face(vocab, merges, arguments.output_dir)
            size, what = len(vocab), f"{len(merges)} merges"
        else:
            model = train_sentencepiece(texts, arguments.vocab_size)
            write_model(model, arguments.output_dir)
            size, what = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size(), "SentencePiece"
    except (DataError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output_dir}: {size} ids, {what}")
    if size < arguments.vocab_size:
        print(f"note: the text has no pairs left to merge for --vocab-size {arguments.vocab_size}", file=sys.stderr)
    return 0


def read_texts(paths: Sequence[Path], input_format: str, keys: Sequence[str], max_document_mb: int) -> Iterator[str]:
    for texts, _ in read_documents(paths, input_format, keys, max_document_mb):
        yield from map(valid_unicode, texts)


def train(texts: Iterator[str], vocab_size: int, min_frequency: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a BPE; return token ids and merges, the most frequent pair first. The last id ends a document."""
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


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """Train a BPE that loses nothing but the mark for a space; TokenizerError if there is too little text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence for text in texts for sentence in sentences(text)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=LARGEST_CHARACTER * LONGEST_SENTENCE,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].strip(" .")
        raise TokenizerError(
            f"SentencePiece cannot learn a --vocab-size ({vocab_size}) from the input: {reason}; give more text, or a "
            "larger --vocab-size where the characters of the text need it."
        ) from error
    return model.getvalue()


def sentences(text: str) -> Iterator[str]:
    """Yield the lines of a text, with lines that are too long cut into parts."""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), LONGEST_SENTENCE):
            yield line[start : start + LONGEST_SENTENCE]


def write_model(model: bytes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "tokenizer.model") as path:
        path.write_bytes(model)


def write(vocab: dict[str, int], merges: Sequence[tuple[str, str]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "vocab.json") as path:
        path.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    with atomic_path(folder / "merges.txt") as path:
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_hugging_face(vocab: dict[str, int], merges: Sequence[tuple[str, str]], folder: Path) -> None:
    """Write the same tokenizer as transformers reads it."""
    tokenizer = byte_level_bpe(vocab, merges)
    tokenizer.add_special_tokens([tokenizers.AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    config = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
    for name, text in (("tokenizer.json", tokenizer.to_str()), ("tokenizer_config.json", config)):
        with atomic_path(folder / name) as path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_tool(main))
