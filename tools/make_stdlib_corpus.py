"""Write a corpus of real text available on every machine: the sources of the running Python's standard library.

    python tools/make_stdlib_corpus.py --output corpus.jsonl

Each source file is one document, {"text": ..., "name": ...}. The files are shuffled with a fixed seed, so that all
parts of the corpus are alike.
"""

import argparse
import json
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from megatron.core.atomic_file import atomic_path
from megatron.data.text_files import read_source
from megatron.ranks.interrupts import run_tool

SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})
ORDER_SEED = 1234


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON lines file to write")
    parser.add_argument("--max-bytes", type=int, help="stop before the texts pass this size; default: no limit")
    parser.add_argument("--source", type=Path, help="folder to read; default: the standard library")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    source = arguments.source or Path(sysconfig.get_paths()["stdlib"])
    try:
        num_documents, num_bytes = write_corpus(arguments.output, documents(source, arguments.max_bytes))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {num_documents} documents, {num_bytes} bytes of text")
    return 0


def documents(source: Path, max_bytes: int | None) -> Iterator[tuple[str, str]]:
    """Yield name and text of the sources, until the next would pass `max_bytes`."""
    names = [path.relative_to(source) for path in source.rglob("*.py")]
    names = sorted(name for name in names if not SKIPPED_FOLDERS.intersection(name.parts))
    random.Random(ORDER_SEED).shuffle(names)
    total = 0
    for name in names:
        text = read_source(source / name)
        if not text:
            continue
        total += len(text.encode("utf-8"))
        if max_bytes is not None and total > max_bytes:
            return
        yield name.as_posix(), text


def write_corpus(output: Path, corpus: Iterator[tuple[str, str]]) -> tuple[int, int]:
    """Write the corpus and count its documents and the bytes of their texts; ValueError if there are none."""
    num_documents = num_bytes = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for name, text in corpus:
                file.write(json.dumps({"text": text, "name": name}, ensure_ascii=False) + "\n")
                num_documents += 1
                num_bytes += len(text.encode("utf-8"))
        if num_documents == 0:
            raise ValueError("no Python sources found within --max-bytes; raise it, or name a folder by --source.")
    return num_documents, num_bytes


if __name__ == "__main__":
    sys.exit(run_tool(main))
