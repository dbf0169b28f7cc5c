#!/usr/bin/env python3
"""Check a dataset (PREFIX.bin and PREFIX.idx) and describe its content.

    python tools/inspect_dataset.py data/corpus_text_document                       counts and lengths of documents
    python tools/inspect_dataset.py data/corpus_text_document --document 7          the token ids of a document
    python tools/inspect_dataset.py data/corpus_text_document --document 7 --tokenizer-type HFTokenizer \\
        --tokenizer-model tokenizer.json                                            its text

It always checks that the two files belong together. With a tokenizer, or --vocab-size alone, it also reads every token
and checks it against the vocabulary. Exit code: 0 for a valid dataset, 2 for any other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

import numpy as np
import numpy.typing as npt

from megatron.arguments import add_flags, section_of
from megatron.config import ConfigError
from megatron.config.packages import require_package
from megatron.config.tokenizer import TokenizerConfig
from megatron.core.atomic_file import atomic_path
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.vocabulary import check_vocabulary
from megatron.ranks.interrupts import run_tool
from megatron.tokenizer import Tokenizer, TokenizerError, tokenizer_of

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
HISTOGRAM_BINS = 60


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="the dataset, without .bin or .idx")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw a histogram of document lengths")
    parser.add_argument("--document", type=int, metavar="N", help="print document N, as text if there is a tokenizer")
    add_flags(parser, TokenizerConfig)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        print(report(arguments))
    except (ConfigError, DataError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(arguments: argparse.Namespace) -> str:
    """Check the dataset and return the output asked for. Raises DataError and TokenizerError."""
    if arguments.plot:
        require_package("matplotlib", f"--plot ({arguments.plot})")
    dataset = IndexedDataset(arguments.prefix)
    tokenizer = given_tokenizer(arguments)
    vocab_size = tokenizer.vocab_size if tokenizer else arguments.vocab_size
    if vocab_size is not None:
        check_vocabulary(dataset, vocab_size, max_tokens=dataset.num_tokens)
    if arguments.plot:
        draw(dataset.document_sizes, arguments.plot, Path(dataset.prefix).name)
    if arguments.document is not None:
        return shown_document(dataset, arguments.document, tokenizer, arguments.json)
    facts = describe(dataset)
    if vocab_size is not None:
        facts["vocabulary"] = vocab_size
    return json.dumps(facts, indent=2) if arguments.json else table(facts)


def given_tokenizer(arguments: argparse.Namespace) -> Tokenizer | None:
    """Build the tokenizer that the flags describe; None if only --vocab-size is given, or nothing."""
    flags = section_of(arguments, TokenizerConfig)
    return None if flags == TokenizerConfig(vocab_size=flags.vocab_size) else tokenizer_of(flags)


def describe(dataset: IndexedDataset) -> dict[str, Any]:
    """Collect counts, and document lengths in tokens."""
    sizes = dataset.document_sizes
    facts: dict[str, Any] = {
        "prefix": dataset.prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "empty_documents": int((sizes == 0).sum()),
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "bytes": dataset.num_tokens * dataset.dtype.itemsize,
    }
    if len(sizes):
        facts |= {"min": int(sizes.min()), "mean": float(sizes.mean()), "max": int(sizes.max())}
        percentiles = np.percentile(sizes, PERCENTILES, method="inverted_cdf")
        facts["percentiles"] = {str(p): int(value) for p, value in zip(PERCENTILES, percentiles, strict=True)}
        facts["median"] = facts["percentiles"]["50"]
    return facts


def table(facts: dict[str, Any]) -> str:
    """Format a line per fact, then the document lengths under their own heading."""
    lengths = {name: facts[name] for name in ("min", "median", "mean", "max") if name in facts}
    lengths |= {f"{p}%": value for p, value in facts.get("percentiles", {}).items()}
    lines = [f"{name.replace('_', ' '):16} {_shown(value)}" for name, value in facts.items()
             if name not in ("min", "median", "mean", "max", "percentiles")]  # fmt: skip
    if lengths:
        lines += ["", "tokens per document", *(f"  {name:14} {_shown(value)}" for name, value in lengths.items())]
    return "\n".join(lines)


def shown_document(dataset: IndexedDataset, number: int, tokenizer: Tokenizer | None, as_json: bool) -> str:
    """Return the text of a document, or its ids without a tokenizer. DataError if there is no such document."""
    if not 0 <= number < dataset.num_documents:
        raise DataError(
            f"--document ({number}) is not there: {dataset.prefix} has {dataset.num_documents} documents, numbered "
            "from 0; give a smaller number."
        )
    ids = dataset.get_document(number).tolist()
    text = tokenizer.detokenize(ids) if tokenizer else None
    if as_json:
        return json.dumps({"document": number, "ids": ids} | ({"text": text} if text is not None else {}))
    return text if text is not None else " ".join(map(str, ids))


def draw(sizes: npt.NDArray[np.int64], path: Path, title: str) -> None:
    """Write a histogram of lengths to a PNG, over a logarithmic axis, without empty documents."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    sizes = sizes[sizes > 0]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    if len(sizes):
        axes.hist(sizes, bins=np.geomspace(sizes.min(), sizes.max() + 1, HISTOGRAM_BINS))
    axes.set(title=title, xlabel="tokens per document", ylabel="documents", xscale="log")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(run_tool(main))
