#!/usr/bin/env python3
"""Measure how well a model uses a long context.

    tools/eval_long_context.py perplexity --load MODEL --data-path data/books_text_document --contexts 1024 8192 65536
    tools/eval_long_context.py needle --load MODEL --haystack book.txt --lengths 4096 32768 131072 --output-dir needle
    tools/eval_long_context.py longppl --load MODEL --data-path data/books_text_document --length 32768
    tools/eval_long_context.py short --before MODEL --load MODEL --data-path data/books_text_document --length 2048

perplexity measures the loss of the same tokens after more and more context, with FPDT's forward pass. needle hides a
statement at every depth of contexts of every length and asks for it; it writes a heat map and JSON. longppl
measures the perplexity of the tokens that the long context makes predictable. short compares a model with an earlier
one at short contexts; it ends with 1 unless there is no regression. With
--ds-sequence-parallel-fpdt-offloading a context may be longer than fits on the GPU. MODEL is a training checkpoint,
portable weights or a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

import numpy as np
import numpy.typing as npt
from argument_types import real, whole
from model_arguments import ChosenModel, add_model_arguments, run_on_model

from megatron.arguments import token_count
from megatron.config.packages import require_package
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.vocabulary import check_tokens
from megatron.evaluation.context_loss import ContextLoss, loss_by_context
from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.heat_map import draw_heat_map
from megatron.evaluation.long_perplexity import KeyTokenRule, LongPerplexity, key_tokens_in, measure_document, pooled
from megatron.evaluation.needle import Cell, Haystack, SyntheticHaystack, TextHaystack, find_needles
from megatron.evaluation.recall import RecallVocabulary
from megatron.evaluation.short_context import compare, document_losses
from megatron.generation.cached_model import CachedModel
from megatron.ranks.interrupts import run_tool
from megatron.tokenizer import Tokenizer

QUESTION = "\nThe secret number of {key} is"
CONTEXTS = (1024, 4096, 16384, 65536)
LENGTHS = (1024, 2048, 4096, 8192)

Tokens = npt.NDArray[Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    perplexity = kinds.add_parser("perplexity", help="loss of the same tokens by context length")
    _add_documents(perplexity)
    perplexity.add_argument(
        "--contexts",
        type=token_count,
        nargs="+",
        default=CONTEXTS,
        metavar="TOKENS",
        help=f"tokens before the scored {CONTEXTS}",
    )
    perplexity.add_argument("--scored-tokens", type=token_count, default=256, metavar="TOKENS", help="[%(default)s]")
    needle = kinds.add_parser("needle", help="find one statement in a long context")
    needle.add_argument("--haystack", type=Path, metavar="FILE", help="a text [synthetic ids: noise, keys and values]")
    needle.add_argument("--question", default=QUESTION, help="of a text; {key} is a name [%(default)r]")
    needle.add_argument("--num-keys", type=int, default=1, help="synthetic ids that are keys [%(default)s]")
    needle.add_argument("--num-values", type=int, default=16, help="synthetic ids that are values [%(default)s]")
    needle.add_argument("--lengths", type=token_count, nargs="+", default=LENGTHS, metavar="TOKENS", help=f"{LENGTHS}")
    needle.add_argument("--depths", type=int, default=11, metavar="N", help="from 0%% to 100%% [%(default)s]")
    needle.add_argument("--trials", type=int, default=4, metavar="N", help="needles per square [%(default)s]")
    needle.add_argument("--seed", type=whole(0, "1234"), default=1234, help="[%(default)s]")
    needle.add_argument(
        "--isolated-chunks", action="store_true", help="control: no chunk of the context attends to another one"
    )
    needle.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="for needle.json and needle.png")
    longppl = kinds.add_parser("longppl", help="perplexity of the tokens that need the long context")
    _add_long_perplexity(longppl)
    short = kinds.add_parser("short", help="whether a model got worse at short contexts")
    _add_short_context(short)
    for each in (perplexity, needle, longppl, short):
        add_model_arguments(each)
    arguments = parser.parse_args(argv)
    for flag in ("contexts", "scored_tokens", "documents", "lengths", "depths", "trials", "length", "stride"):
        value = getattr(arguments, flag, 1)
        smallest = min(value) if isinstance(value, Sequence) else value
        if smallest < 1:
            parser.error(f"--{flag.replace('_', '-')} ({smallest}) must be 1 or more.")
    return arguments


def _add_long_perplexity(parser: argparse.ArgumentParser) -> None:
    _add_documents(parser)
    rule = KeyTokenRule()
    parser.add_argument(
        "--length", type=token_count, default=32768, metavar="TOKENS", help="tokens per document [%(default)s]"
    )
    parser.add_argument(
        "--short-context", type=token_count, default=rule.short_context, metavar="TOKENS",
        help="tokens of the context that key tokens need more than [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--stride",
        type=token_count,
        default=rule.stride,
        metavar="TOKENS",
        help="tokens scored per short context [%(default)s]",
    )
    parser.add_argument(
        "--key-tokens", type=Path, metavar="FILE", help="the --output of another model [this model's own]"
    )


def _add_short_context(parser: argparse.ArgumentParser) -> None:
    _add_documents(parser)
    parser.add_argument("--before", type=Path, required=True, metavar="MODEL", help="the model to compare --load with")
    parser.add_argument(
        "--length", type=token_count, default=2048, metavar="TOKENS", help="tokens per document [%(default)s]"
    )
    parser.add_argument(
        "--tolerance", type=real(0, "0.02"), default=0.02, metavar="NATS",
        help="rise of the loss that is no regression [%(default)g]",
    )  # fmt: skip


def _add_documents(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("documents").add_mutually_exclusive_group(required=True)
    data.add_argument("--data-path", metavar="PREFIX", help="a dataset, PREFIX.bin and PREFIX.idx")
    data.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="text files, a document each")
    parser.add_argument("--documents", type=int, default=8, metavar="N", help="maximum to read [%(default)s]")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON to write [none]")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_on_model(KINDS[arguments.kind], arguments)


def measure_perplexity(arguments: argparse.Namespace) -> int:
    """Print the loss and perplexity by context length, and write them as JSON if asked."""
    chosen, longest = ChosenModel.of(arguments), max(arguments.contexts) + arguments.scored_tokens
    chosen.check_length("--contexts with --scored-tokens", longest)
    documents = list(read_documents(arguments, chosen, longest))
    model = chosen.build(longest).model
    results = loss_by_context(model, documents, sorted(set(arguments.contexts)), arguments.scored_tokens)
    print(f"{'context':>12} {'loss':>10} {'perplexity':>12} {'tokens':>10}")
    for result in results:
        print(f"{result.context:>12,} {result.loss:>10.4f} {result.perplexity:>12.3f} {result.num_tokens:>10,}")
    if arguments.output is not None:
        _write_json(arguments.output, {"load": str(arguments.load), "contexts": [_as_json(each) for each in results]})
    return 0


def read_documents(arguments: argparse.Namespace, chosen: ChosenModel, length: int) -> Iterator[list[int]]:
    """Yield the first documents that are long enough, `length` tokens of each; DataError for an unknown id."""
    for name, tokens in islice(_documents(arguments, chosen.tokenizer, length), arguments.documents):
        check_tokens(tokens, chosen.num_ids, name)
        yield tokens.tolist()


def _documents(arguments: argparse.Namespace, tokenizer: Tokenizer, length: int) -> Iterator[tuple[str, Tokens]]:
    if arguments.data_path is not None:
        indexed = IndexedDataset(arguments.data_path)
        for number in np.flatnonzero(indexed.document_sizes >= length):
            yield f"document {number} of {indexed.prefix}", indexed.get_document(int(number), 0, length)
        return
    for path in arguments.text:
        tokens = tokenizer.tokenize(path.read_text(encoding="utf-8"))
        if len(tokens) >= length:
            yield str(path), np.array(tokens[:length], dtype=np.int64)


def search_needles(arguments: argparse.Namespace) -> int:
    """Search for needles; write needle.json and needle.png, and print the accuracies."""
    require_package("matplotlib", f"the heat map in --output-dir ({arguments.output_dir})")
    chosen = ChosenModel.of(arguments, arguments.isolated_chunks)
    chosen.check_length("--lengths", max(arguments.lengths))
    haystack = haystack_of(arguments, chosen.tokenizer)
    model = chosen.build(max(arguments.lengths))
    depths = [step / max(arguments.depths - 1, 1) for step in range(arguments.depths)]
    lengths = sorted(set(arguments.lengths))
    cells = find_needles(model, haystack, lengths, depths, arguments.trials, arguments.seed)
    _print_cells(cells, lengths)
    content = {
        "load": str(arguments.load),
        "isolated_chunks": arguments.isolated_chunks,
        "trials": arguments.trials,
        "cells": [asdict(cell) for cell in cells],
    }
    _write_json(arguments.output_dir / "needle.json", content)
    draw_heat_map(cells, arguments.output_dir / "needle.png", f"needles found by {arguments.load.name}")
    print(f"{arguments.output_dir / 'needle.png'}")
    return 0


def haystack_of(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Haystack:
    """Return the text named, or synthetic ids; EvaluationError if neither can be used."""
    if arguments.haystack is not None:
        text = tokenizer.tokenize(arguments.haystack.read_text(encoding="utf-8"))
        return TextHaystack(text, tokenizer.tokenize, arguments.question)
    if arguments.tokenizer_type != "NullTokenizer":
        raise EvaluationError("without --haystack ids are synthetic, which is for NullTokenizer; name a text.")
    return SyntheticHaystack(RecallVocabulary(tokenizer.eod, arguments.num_keys, arguments.num_values))


def measure_long_perplexity(arguments: argparse.Namespace) -> int:
    """Print perplexity and LongPPL of every document and of all, and write them as JSON if asked."""
    if not 1 <= arguments.short_context < arguments.length:
        raise EvaluationError(
            f"--short-context ({arguments.short_context}) must be 1 or more and below --length ({arguments.length})."
        )
    rule = KeyTokenRule(arguments.short_context, arguments.stride)
    known = None if arguments.key_tokens is None else json.loads(arguments.key_tokens.read_text(encoding="utf-8"))
    model, documents = _model_and_documents(arguments)
    results = []
    print(f"{'document':>10} {'perplexity':>12} {'LongPPL':>12} {'key tokens':>12}")
    for number, document in enumerate(documents):
        given = None if known is None else key_tokens_in(known, document)
        results.append(measure_document(model, document, rule, given))
        _print_pooled(str(number), results[-1:])
    _print_pooled("all", results)
    if arguments.output is not None:
        perplexity, long_perplexity, num_key_tokens = pooled(results)
        content = {
            "load": str(arguments.load),
            "rule": asdict(rule) if known is None else str(arguments.key_tokens),
            "perplexity": perplexity,
            "longppl": long_perplexity if num_key_tokens else None,
            "documents": [asdict(each) | {"key_loss": each.key_loss if each.key_tokens else None} for each in results],
        }
        _write_json(arguments.output, content)
    return 0


def _print_pooled(name: str, results: Sequence[LongPerplexity]) -> None:
    perplexity, long_perplexity, num_key_tokens = pooled(results)
    print(f"{name:>10} {perplexity:>12.3f} {long_perplexity:>12.3f} {num_key_tokens:>12,}", flush=True)


def compare_short_context(arguments: argparse.Namespace) -> int:
    """Print the losses of both models and the verdict; return 0 if there is no regression, else 1."""
    model, documents = _model_and_documents(arguments)
    after = document_losses(model, documents)
    del model  # before the other one is read
    arguments.load = arguments.before
    model, same_documents = _model_and_documents(arguments)
    if same_documents != documents:
        raise EvaluationError(
            f"--before ({arguments.before}) has another tokenizer than --load, so losses per token do not compare; "
            "name one by --tokenizer-model, or use a model with the same."
        )
    result = compare(document_losses(model, documents), after, arguments.tolerance)
    print(
        f"loss before {result.before:.4f}, after {result.after:.4f}, difference {result.difference:+.4f} +- "
        f"{2 * result.standard_error:.4f} (two standard errors of {result.num_documents} documents)\n"
        f"{result.verdict} beyond {result.tolerance:g}"
    )
    if arguments.output is not None:
        _write_json(arguments.output, asdict(result) | {"verdict": result.verdict, "length": arguments.length})
    return int(result.verdict != "no regression")


def _model_and_documents(arguments: argparse.Namespace) -> tuple[CachedModel, list[list[int]]]:
    """Return the model of --load, and the documents of --length tokens; EvaluationError if there are none."""
    if arguments.length < 2:
        raise EvaluationError(f"--length ({arguments.length}) must be 2 or more: the first token has no context.")
    chosen = ChosenModel.of(arguments)
    chosen.check_length("--length", arguments.length)
    documents = list(read_documents(arguments, chosen, arguments.length))
    if not documents:
        raise EvaluationError(
            f"there are no documents of {arguments.length} tokens or more; use a shorter --length or longer documents."
        )
    return chosen.build(arguments.length), documents


def _print_cells(cells: Sequence[Cell], lengths: Sequence[int]) -> None:
    print(f"{'depth':>6} " + " ".join(f"{length:>10,}" for length in lengths))
    for depth in sorted({cell.depth for cell in cells}):
        row = {cell.length: cell for cell in cells if cell.depth == depth}
        print(f"{depth:>6.0%} " + " ".join(f"{row[length].accuracy:>10.2f}" for length in lengths))


def _as_json(result: ContextLoss) -> dict[str, float]:
    return {**asdict(result), "perplexity": result.perplexity}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


KINDS = {
    "perplexity": measure_perplexity,
    "needle": search_needles,
    "longppl": measure_long_perplexity,
    "short": compare_short_context,
}

if __name__ == "__main__":
    sys.exit(run_tool(main))
