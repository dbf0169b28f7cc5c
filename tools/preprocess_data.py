"""Turn text into tokens: JSON lines or text files in, Megatron's PREFIX_KEY_document.bin and .idx out.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod --workers 8 \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt

The output appears only when all of it is written.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from megatron.data.encoding import EncoderPlan, encode_documents
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDatasetWriter
from megatron.data.text_files import INPUT_FORMATS, find_inputs, read_documents
from megatron.tokenizer import TOKENIZER_TYPES, TokenizerError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("input")
    source.add_argument("--input", nargs="+", required=True, help="files, folders or quoted patterns; .gz is unpacked")
    source.add_argument("--input-format", choices=INPUT_FORMATS, default="jsonl", help="text: each file is a document")
    source.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts; one dataset for each")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    tokenizer.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument("--tokenizer-model", help="model file of SentencePieceTokenizer or HFTokenizer")
    tokenizer.add_argument("--vocab-size", type=int, help="number of ids of NullTokenizer")
    tokenizer.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document id")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="the files are PREFIX_KEY_document.bin and .idx")
    output.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    output.add_argument("--log-interval", type=int, default=1000, help="documents between two progress reports")
    arguments = parser.parse_args(argv)
    for flag in ("workers", "log_interval"):
        if getattr(arguments, flag) < 1:
            name = flag.replace("_", "-")
            parser.error(f"--{name} ({getattr(arguments, flag)}) must be 1 or more; use for example --{name} 1.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        preprocess(arguments)
    except (DataError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def preprocess(arguments: argparse.Namespace) -> None:
    """Write the datasets that the arguments describe, one per key."""
    paths = find_inputs(arguments.input, arguments.input_format)
    plan = EncoderPlan(
        tokenizer_type=arguments.tokenizer_type,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
        tokenizer_model=arguments.tokenizer_model,
        vocab_size=arguments.vocab_size,
        append_eod=arguments.append_eod,
    )
    dtype = plan.build().dtype
    keys = arguments.json_keys if arguments.input_format == "jsonl" else ["text"]
    Path(arguments.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(arguments.log_interval))
        writers = [
            stack.enter_context(IndexedDatasetWriter(f"{arguments.output_prefix}_{key}_document", dtype))
            for key in keys
        ]
        documents = read_documents(paths, arguments.input_format, keys)
        for texts, num_bytes in encode_documents(documents, plan, arguments.workers):
            for writer, tokens in zip(writers, texts, strict=True):
                if len(tokens):
                    writer.add_document(tokens)
            progress.advance(num_bytes)
        refuse_empty(writers)
    for writer in writers:
        print(f"{writer.prefix}: {writer.num_documents} documents, {writer.num_tokens} tokens, {dtype.name}")


def refuse_empty(writers: Sequence[IndexedDatasetWriter]) -> None:
    for writer in writers:
        if writer.num_tokens == 0:
            raise DataError(f"the input has no text for {writer.prefix}; nothing is written; give input that has some.")


class Progress:
    """A bar where the output is a terminal, a line per `interval` documents where it is not."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._started = time.perf_counter()
        self._num_documents = 0
        self._num_bytes = 0
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(unit=" documents", disable=not self._is_terminal)

    def advance(self, num_bytes: int) -> None:
        """Count one more document."""
        self._num_documents += 1
        self._num_bytes += num_bytes
        self._bar.update()
        if self._num_documents % self._interval:
            return
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rate = f"{self._num_bytes / 2**20 / seconds:.2f} MiB/s"
        if self._is_terminal:
            self._bar.set_postfix_str(rate)
        else:
            per_second = self._num_documents / seconds
            print(f"{self._num_documents} documents, {per_second:.0f} documents/s, {rate}", file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
