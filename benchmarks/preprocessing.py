#!/usr/bin/env python3
"""Compare the speed of tools/preprocess_data.py with that of the bare tokenizer library.

    python benchmarks/preprocessing.py

"bare library" is N processes that only encode their share of the texts, from memory, with the library's fastest call
(encode_batch_fast). "bare encode" is the same with its usual call. "preprocess_data" is the tool with N workers, from
JSON lines on disk to the dataset, including its start and that of its workers. "at work" is the same minus the start,
which is the time of a corpus of one document. The text is the source of the standard library, repeated; the tokenizer
is a byte-level BPE trained on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import REPOSITORY, Column, Row, Table, git_commit, spread
from megatron.data.indexed_dataset import IndexedDataset
from megatron.tokenizer import build_tokenizer

NAME = "preprocessing"
COLUMNS = (
    Column("what", "what", width=16),
    Column("workers", "workers"),
    Column("seconds", "seconds", ".2f"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("mib_per_second", "MiB/s", ".2f"),
    Column("times_bare", "x bare library", ".3f"),
    Column("spread", "spread", ".1%"),
)
CALLS = ("encode_batch_fast", "encode")
MIB = 2**20


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=64, help="text to encode [%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer [%(default)s]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="[%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks") / NAME, help="writes OUTPUT.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    table, rows = Table(COLUMNS), []
    commit = git_commit(REPOSITORY)
    print(f"commit {commit}, {arguments.mib:g} MiB of text\n{table.heading()}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        corpus = prepare(Path(name), arguments.mib, arguments.vocab_size)
        for workers in arguments.workers:
            for row in compare(corpus, workers, arguments.repeats):
                rows.append(row)
                print(table.line(row), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": NAME, "commit": commit, "mib": arguments.mib, "rows": rows}
    arguments.output.with_name(arguments.output.name + ".json").write_text(json.dumps(content, indent=2) + "\n")
    return 0


def prepare(folder: Path, mib: float, vocab_size: int) -> Path:
    """Write corpus.jsonl, one.jsonl with one document of it, and a tokenizer; return the folder."""
    run_tool("make_stdlib_corpus", "--output", folder / "source.jsonl", "--max-bytes", int(min(mib, 16) * MIB))
    lines = (folder / "source.jsonl").read_bytes().splitlines(keepends=True)
    with (folder / "corpus.jsonl").open("wb") as file:
        written = 0
        while written < mib * MIB:
            for line in lines:
                written += file.write(line)
    (folder / "one.jsonl").write_bytes(lines[0])
    words = ("--vocab-size", vocab_size, "--output-dir", folder / "tokenizer")
    run_tool("train_tokenizer", "--input", folder / "source.jsonl", *words)
    return folder


def compare(folder: Path, workers: int, repeats: int) -> list[Row]:
    """Measure the library alone, the tool, and the tool without its start."""
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").open(encoding="utf-8")]
    num_bytes = sum(len(text.encode()) for text in texts)
    bare, usual = ([bare_seconds(folder, texts, workers, call) for _ in range(repeats)] for call in CALLS)
    whole = [seconds_of(lambda: preprocess(folder, "corpus", workers)) for _ in range(repeats)]
    start = statistics.median(seconds_of(lambda: preprocess(folder, "one", workers)) for _ in range(repeats))
    num_tokens = IndexedDataset(folder / "corpus_text_document").num_tokens
    at_work = [each - start for each in whole]
    cases = {"bare library": bare, "bare encode": usual, "preprocess_data": whole, "at work": at_work}
    return [
        {
            "what": what,
            "workers": workers,
            "seconds": statistics.median(seconds),
            "tokens_per_second": num_tokens / statistics.median(seconds),
            "mib_per_second": num_bytes / MIB / statistics.median(seconds),
            "times_bare": statistics.median(bare) / statistics.median(seconds),
            "spread": spread(seconds),
        }
        for what, seconds in cases.items()
    ]


def bare_seconds(folder: Path, texts: Sequence[str], workers: int, call: str) -> float:
    """Time `workers` processes that encode the texts, each its share."""
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [
        context.Process(target=encode_share, args=(there, str(folder), texts[number::workers], call))
        for number, (_, there) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for here, _ in pipes:
        here.recv()

    def encode() -> None:
        for here, _ in pipes:
            here.send("start")
        for here, _ in pipes:
            here.recv()

    seconds = seconds_of(encode)
    for process in processes:
        process.join()
    return seconds


def encode_share(pipe: Connection, folder: str, texts: Sequence[str], call: str) -> None:
    """Encode texts with the bare library on a signal, and discard the results."""
    files = (f"{folder}/tokenizer/vocab.json", f"{folder}/tokenizer/merges.txt")
    library: Any = build_tokenizer("GPT2BPETokenizer", *files)._tokenizer  # type: ignore[attr-defined]
    pipe.send("ready")
    pipe.recv()
    for text in texts:
        _ = library.encode(text).ids if call == "encode" else library.encode_batch_fast([text])[0].ids
    pipe.send("done")


def preprocess(folder: Path, name: str, workers: int) -> None:
    """Run the tool on NAME.jsonl."""
    files = ("--vocab-file", folder / "tokenizer/vocab.json", "--merge-file", folder / "tokenizer/merges.txt")
    words = ("--input", folder / f"{name}.jsonl", "--output-prefix", folder / name, "--workers", workers)
    run_tool("preprocess_data", *words, *files)


def run_tool(name: str, *words: object) -> None:
    script = REPOSITORY / "tools" / f"{name}.py"
    subprocess.run([sys.executable, script, *map(str, words)], check=True, capture_output=True)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
