"""Tokenize text: JSON lines, Parquet or text files in, Megatron's PREFIX_KEY_document.bin and .idx out.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod --workers 8 \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt

The output appears only when it is complete. Until then it grows in PREFIX.preprocessing, and the same command resumes
an interrupted run from there.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from progress_bar import NoBar, progress_bar

from megatron.arguments import add_flags, section_of
from megatron.config.tokenizer import TokenizerConfig
from megatron.data.encoding import EncodedBatch, EncoderPlan, encode_batches
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import index_path
from megatron.data.json_records import DEFAULT_MAX_DOCUMENT_MB
from megatron.data.output_names import check_output_name
from megatron.data.text_files import INPUT_FORMATS, InputPosition, find_inputs, read_batches
from megatron.data.workspace import Mark, Note, PartialDataset, Workspace
from megatron.ranks.interrupts import run_tool
from megatron.tokenizer import TokenizerError, tokenizer_settings_in

BAD_RECORDS_SHOWN = 5
HOW_TO_RESUME = "the same command resumes from the last saved progress, or starts over if there is none yet"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("input")
    source.add_argument("--input", nargs="+", required=True,
                        help="files, folders or quoted patterns; .gz and .zst are unpacked")  # fmt: skip
    source.add_argument("--input-format", choices=INPUT_FORMATS, default="auto",
                        help="text: each file is a document; auto: .parquet is Parquet, the rest jsonl")  # fmt: skip
    source.add_argument("--json-keys", nargs="+", default=["text"],
                        help="keys, or columns, of the texts; one dataset for each")  # fmt: skip
    source.add_argument("--skip-bad-lines", action="store_true",
                        help="skip and count lines, rows and text files that cannot be read")  # fmt: skip
    source.add_argument("--max-document-mb", type=int, default=DEFAULT_MAX_DOCUMENT_MB,
                        help="maximum MiB of a line, row or text file; longer ones are bad [%(default)s]")  # fmt: skip
    source.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document id")
    add_flags(parser, TokenizerConfig)
    parser.add_argument("--hf-model", type=Path, metavar="FOLDER",
                        help="Hugging Face model whose tokenizer to use, in place of the flags above")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="the files are PREFIX_KEY_document.bin and .idx")
    output.add_argument("--workers", type=int, default=1, help="number of tokenizer processes")
    output.add_argument("--log-interval", type=int, default=1000, help="documents between progress reports")
    output.add_argument("--save-seconds", type=float, default=30.0,
                        help="seconds between saves of the progress, to resume from [%(default)s]")  # fmt: skip
    output.add_argument("--restart", action="store_true", help="start over instead of resuming an interrupted run")
    arguments = parser.parse_args(argv)
    refuse_two_tokenizers(parser, arguments)
    for flag in ("workers", "log_interval"):
        if getattr(arguments, flag) < 1:
            name = flag.replace("_", "-")
            parser.error(f"--{name} ({getattr(arguments, flag)}) must be 1 or more; use for example --{name} 1.")
    if len(set(arguments.json_keys)) < len(arguments.json_keys):
        parser.error(f"--json-keys ({' '.join(arguments.json_keys)}) names a key twice; name each once.")
    return arguments


def refuse_two_tokenizers(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    named = [f"--{name.replace('_', '-')}" for name in vars(TokenizerConfig()) if getattr(arguments, name) is not None]
    if named and arguments.hf_model is not None:
        names = ", ".join(named)
        parser.error(f"{names} and --hf-model ({arguments.hf_model}) both name a tokenizer; keep one of them.")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        preprocess(arguments)
    except (DataError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, OSError):
            print(HOW_TO_RESUME, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {HOW_TO_RESUME}", file=sys.stderr)
        return 130
    return 0


def preprocess(arguments: argparse.Namespace) -> None:
    """Write the datasets that the arguments describe, one per key."""
    choose_tokenizer(arguments)
    keys = arguments.json_keys if arguments.input_format != "text" else ["text"]
    prefixes = {key: f"{arguments.output_prefix}_{key}_document" for key in keys}
    folder = Path(f"{arguments.output_prefix}.preprocessing")
    for output in (folder, *map(index_path, prefixes.values())):
        check_output_name(output, "--output-prefix with --json-keys")
    paths = find_inputs(arguments.input, arguments.input_format)
    plan = EncoderPlan(
        section_of(arguments, TokenizerConfig),
        append_eod=arguments.append_eod,
        skip_bad_records=arguments.skip_bad_lines,
    )
    dtype = plan.build().dtype
    with Workspace(folder, settings_of(arguments), paths, arguments.restart) as workspace:
        run = Run(workspace, plan, paths, keys, arguments)
        if not (workspace.note and workspace.note.is_finished):
            run.write(dtype)
        mark = run.mark
        workspace.publish(prefixes)
    for prefix, (num_documents, num_tokens) in zip(prefixes.values(), mark.written, strict=True):
        print(f"{prefix}: {num_documents} documents, {num_tokens} tokens, {dtype.name}")
    if mark.bad_records:
        print(f"{mark.bad_records} bad lines were left out")


def choose_tokenizer(arguments: argparse.Namespace) -> None:
    """Set the flags of the tokenizer to those of the folder of --hf-model, or to the default type."""
    if arguments.hf_model is not None:
        vars(arguments).update(vars(tokenizer_settings_in(arguments.hf_model)))
    arguments.tokenizer_type = arguments.tokenizer_type or TokenizerConfig().tokenizer_type


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the output depends on besides the input files, by flag."""
    names = ("input_format", "json_keys", "tokenizer_type", "tiktoken_pattern", "vocab_size", "append_eod")
    settings = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names}
    for name in ("vocab_file", "merge_file", "tokenizer_model"):
        value = getattr(arguments, name)
        settings[f"content of --{name.replace('_', '-')}"] = content_hash(Path(value)) if value else None
    return settings


def content_hash(path: Path) -> str:
    """Return the start of the SHA-256 of a file, or of the tokenizer files in a folder."""
    files = [path] if path.is_file() else [path / "tokenizer.json", path / "tokenizer_config.json"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()[:16]


class Run:
    """One run over the input, which resumes where the last one was interrupted."""

    def __init__(
        self, workspace: Workspace, plan: EncoderPlan, paths: Sequence[Path], keys: Sequence[str],
        arguments: argparse.Namespace,
    ) -> None:  # fmt: skip
        self._workspace, self._plan, self._paths, self._keys = workspace, plan, paths, keys
        self._arguments = arguments
        nothing = Mark(InputPosition(), tuple((0, 0) for _ in keys))
        note = workspace.note or Note(nothing, nothing)
        self.mark, self._start_of_file = note.mark, note.start_of_file
        if self.mark.bad_records and not plan.skip_bad_records:
            raise DataError(
                f"the interrupted run left out {self.mark.bad_records} bad lines; give --skip-bad-lines to resume, "
                "or --restart to start over."
            )

    def write(self, dtype: Any) -> None:
        """Read and tokenize the rest of the input. Raises DataError, also if there is no text at all."""
        position = self.mark.position
        if position != InputPosition():
            print(f"resuming after file {position.file} and {position.record} records of the next", file=sys.stderr)
        datasets = [
            self._workspace.open_dataset(key, dtype, written)
            for key, written in zip(self._keys, self.mark.written, strict=True)
        ]
        settings = self._arguments
        batches = read_batches(self._paths, settings.input_format, self._keys, position, settings.max_document_mb)
        last_saved = time.monotonic()
        with ExitStack() as stack:
            for dataset in datasets:
                stack.callback(dataset.close)
            progress = stack.enter_context(Progress(self._arguments.log_interval))
            for batch in encode_batches(batches, self._plan, self._arguments.workers):
                self._take(batch, datasets)
                progress.advance(batch)
                if time.monotonic() - last_saved >= self._arguments.save_seconds:
                    self._workspace.save(Note(self.mark, self._start_of_file), datasets)
                    last_saved = time.monotonic()
            refuse_empty(self._keys, datasets)
            for dataset in datasets:
                dataset.flush()
                dataset.finish()
        self._workspace.save(Note(self.mark, self._start_of_file, is_finished=True), [])

    def _take(self, batch: EncodedBatch, datasets: Sequence[PartialDataset]) -> None:
        for dataset, tokens, sizes in zip(datasets, batch.tokens, batch.sizes, strict=True):
            dataset.add_documents(tokens, sizes)
        for number, message in enumerate(batch.bad_records, start=self.mark.bad_records):
            if number < BAD_RECORDS_SHOWN:
                print(f"left out: {message}", file=sys.stderr)
        num_bad = self.mark.bad_records + len(batch.bad_records)
        finished_file = batch.end.file > self.mark.position.file
        if finished_file:
            self._workspace.check_unchanged(batch.end.file - 1)
        self.mark = Mark(batch.end, tuple(dataset.written for dataset in datasets), num_bad)
        if finished_file:
            self._start_of_file = self.mark


def refuse_empty(keys: Sequence[str], datasets: Sequence[PartialDataset]) -> None:
    for key, dataset in zip(keys, datasets, strict=True):
        if dataset.num_tokens == 0:
            raise DataError(f"the input has no text for {key}; nothing is written; give input that has some.")


class Progress:
    """A progress bar on a terminal; elsewhere a line per `interval` documents, or slightly more."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._started = time.perf_counter()
        self._num_documents = self._num_bytes = self._num_tokens = 0
        self._bar = progress_bar(" documents")

    def advance(self, batch: EncodedBatch) -> None:
        """Count the documents of a batch."""
        reports = self._num_documents // self._interval
        self._num_documents += batch.num_documents
        self._num_bytes += batch.num_bytes
        self._num_tokens += sum(len(tokens) for tokens in batch.tokens)
        self._bar.update(batch.num_documents)
        if self._num_documents // self._interval == reports:
            return
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rate = f"{self._num_tokens / seconds:,.0f} tokens/s, {self._num_bytes / 2**20 / seconds:.2f} MiB/s"
        if isinstance(self._bar, NoBar):
            per_second = self._num_documents / seconds
            print(f"{self._num_documents} documents, {per_second:.0f} documents/s, {rate}", file=sys.stderr)
        else:
            self._bar.set_postfix_str(rate)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


if __name__ == "__main__":
    sys.exit(run_tool(main))
