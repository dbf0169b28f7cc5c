#!/usr/bin/env python3
"""Generate text with a trained model.

    tools/generate_samples_gpt.py --load runs/llama/checkpoints --tokenizer-model tokenizer.json --prompt "Once upon"
    tools/generate_samples_gpt.py --load models/Llama-3.2-1B --sample-input-file prompts.jsonl --output-format jsonl
    tools/generate_samples_gpt.py --load weights          # asks for prompts, or reads them from stdin, a line each

The prompt is prefilled chunk by chunk; then tokens are decoded one by one over the KV cache. With
--ds-sequence-parallel-fpdt-offloading the cache is in host memory, so a prompt may be longer than fits on the GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from argument_types import whole
from model_arguments import ChosenModel, add_model_arguments, run_on_model

from megatron.arguments import token_count
from megatron.generation.cached_model import CachedModel, check_prompt
from megatron.generation.errors import GenerationError
from megatron.generation.generate import Generated, generate
from megatron.generation.sampling import Sampling
from megatron.ranks.interrupts import run_tool
from megatron.tokenizer import Tokenizer, TokenizerError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    prompts = parser.add_argument_group("prompts")
    given = prompts.add_mutually_exclusive_group()
    given.add_argument("--prompt", nargs="+", metavar="TEXT", help="one prompt or several [lines of stdin]")
    given.add_argument(
        "--sample-input-file", type=Path, metavar="FILE",
        help='a prompt per line; in a .jsonl file {"prompt": "..."} per line',
    )  # fmt: skip
    prompts.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts per batch [%(default)s]")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--greedy", action="store_true", help="always take the most likely token")
    sampling.add_argument("--temperature", type=float, default=1.0, help="divide logits by this [%(default)g]")
    sampling.add_argument("--top-k", type=int, default=0, help="sample from the K most likely tokens [0: all]")
    sampling.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens of this probability [1: all]"
    )
    sampling.add_argument("--seed", type=whole(0, "1234"), default=1234, help="[%(default)s]")
    length = sampling.add_mutually_exclusive_group()
    length.add_argument("--max-new-tokens", type=token_count, metavar="TOKENS", help="maximum after a prompt [128]")
    length.add_argument("--out-seq-length", type=token_count, metavar="TOKENS", help="maximum, prompt included")
    output = parser.add_argument_group("output")
    output.add_argument("--sample-output-file", type=Path, metavar="FILE", help="[stdout]")
    output.add_argument("--output-format", choices=("text", "jsonl"), default="text", help="[%(default)s]")
    arguments = parser.parse_args(argv)
    for flag in ("batch_size", "max_new_tokens", "out_seq_length"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} ({value}) must be 1 or more.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    return run_on_model(run, parse_arguments(argv))


def run(arguments: argparse.Namespace) -> int:
    """Answer every prompt. ValueError for a bad request, before weights are read where the flags give the prompts."""
    sampling = Sampling(arguments.greedy, arguments.temperature, arguments.top_k, arguments.top_p)
    chosen = ChosenModel.of(arguments)
    tokenizer = chosen.tokenizer
    is_given = arguments.prompt is not None or arguments.sample_input_file is not None
    texts = read_prompts(arguments) if is_given else None
    longest = chosen.opened.portable.model.max_position_embeddings
    if texts is not None:
        prompts = [tokenizer.tokenize(text) for text in texts]
        limits = [limit_of(arguments, prompt) for prompt in prompts]
        for prompt, limit in zip(prompts, limits, strict=True):
            check_prompt(prompt, limit, chosen.num_ids, chosen.opened.max_length)
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    model = chosen.build(longest)
    with open_output(arguments.sample_output_file) as file:
        if texts is not None:
            write_samples(arguments, model, tokenizer, sampling, texts, file)
        else:
            answer_lines(arguments, model, tokenizer, sampling, file)
    return 0


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Read the prompts that the flags give; ValueError if a file has none or has the wrong form."""
    path: Path | None = arguments.sample_input_file
    if path is None:
        return list(arguments.prompt)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise GenerationError(f"--sample-input-file ({path}) has no prompts; write one per line.")
    if path.suffix != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)["prompt"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise GenerationError(f'{path} has a line that is not {{"prompt": "..."}} ({error}); write it so.') from error


def limit_of(arguments: argparse.Namespace, prompt: Sequence[int]) -> int:
    """Return the maximum number of new tokens for a prompt; GenerationError if it is below 1."""
    if arguments.out_seq_length is None:
        return int(arguments.max_new_tokens or 128)
    limit = arguments.out_seq_length - len(prompt)
    if limit < 1:
        raise GenerationError(
            f"--out-seq-length ({arguments.out_seq_length}) leaves no room after a prompt of {len(prompt)} tokens; "
            f"use {len(prompt) + 1} or more, or --max-new-tokens."
        )
    return int(limit)


def open_output(path: Path | None) -> TextIO:
    """Open the output file, or stdout, which closing leaves open."""
    if path is None:
        return open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def answer_lines(
    arguments: argparse.Namespace, model: CachedModel, tokenizer: Tokenizer, sampling: Sampling, file: TextIO
) -> None:
    """Answer the lines of stdin one by one; at a terminal, report a bad line and ask for the next."""
    is_terminal = sys.stdin.isatty()
    for line in _lines(is_terminal):
        try:
            write_samples(arguments, model, tokenizer, sampling, [line], file)
        except (GenerationError, TokenizerError) as error:
            if not is_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)


def _lines(is_terminal: bool) -> Iterator[str]:
    while True:
        if is_terminal:
            print("prompt> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def write_samples(
    arguments: argparse.Namespace,
    model: CachedModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    texts: Iterable[str],
    file: TextIO,
) -> None:
    """Generate after each text, batch by batch, and write the results."""
    remaining = iter(texts)
    seed = arguments.seed
    while batch := list(islice(remaining, arguments.batch_size)):
        prompts = [tokenizer.tokenize(text) for text in batch]
        limits = [limit_of(arguments, prompt) for prompt in prompts]
        results = generate(model, prompts, limits, sampling, tokenizer.eod, seed)
        seed += len(batch)
        for text, prompt, result in zip(batch, prompts, results, strict=True):
            file.write(_formatted(arguments.output_format, tokenizer, text, prompt, result) + "\n")
        file.flush()


def _formatted(output_format: str, tokenizer: Tokenizer, text: str, prompt: list[int], result: Generated) -> str:
    tokens = result.tokens[:-1] if result.ended else result.tokens
    # A tokenizer may decode a token differently at the start of a text.
    before, whole = tokenizer.detokenize(prompt), tokenizer.detokenize(prompt + tokens)
    if output_format == "text":
        return whole
    content = {
        "prompt": text,
        "text": whole.removeprefix(before),
        "tokens": result.tokens,
        "log_probabilities": result.log_probabilities,
        "ended": result.ended,
    }
    return json.dumps(content, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(run_tool(main))
