"""Text from the command line: every source of prompts, both outputs, and what is refused."""

import io
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import VOCAB, save

TOOL = "generate_samples_gpt"
TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB - 1]
FPDT = "--ds-sequence-parallel-fpdt"
CHUNKS = [f"{FPDT}-chunk-size", 8, f"{FPDT}-offloading"]
PROMPTS = ["7 8 9", "3 4 5 6 7 8 9 10 11 12 13", "20"]


@pytest.fixture
def model(tmp_path: Path) -> tuple[nn.Module, Path]:
    return save("gpt2", tmp_path / "model"), tmp_path / "model"


def samples(folder: Path, out: Path, *flags: object) -> list[dict[str, object]]:
    """What the tool writes as JSON lines."""
    arguments = ["--load", folder, *TOKENIZER, *CHUNKS, "--output-format", "jsonl", "--sample-output-file", out, *flags]
    assert run_tool(TOOL, *arguments) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def expected(theirs: nn.Module, prompt: str, new: int) -> str:
    tokens = torch.tensor([[int(word) for word in prompt.split()]])
    generated = theirs.generate(tokens, do_sample=False, max_new_tokens=new, eos_token_id=VOCAB - 1, pad_token_id=0)
    return " ".join(str(token) for token in generated[0, tokens.shape[1] :].tolist() if token != VOCAB - 1)


def test_prompts_of_flags_files_and_stdin_are_answered_alike(
    model: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, folder = model
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(PROMPTS))
    objects.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    sources: list[list[object]] = [
        ["--prompt", *PROMPTS],
        ["--sample-input-file", lines],
        ["--sample-input-file", objects, "--batch-size", 2],
        [],
    ]
    for source in sources:
        got = samples(folder, tmp_path / "out.jsonl", "--greedy", "--max-new-tokens", 6, *source)
        assert [each["prompt"] for each in got] == PROMPTS
        assert [str(each["text"]).strip() for each in got] == [expected(theirs, prompt, 6) for prompt in PROMPTS]


def test_text_goes_to_stdout_with_its_prompt(model: tuple[nn.Module, Path], capfd: pytest.CaptureFixture[str]) -> None:
    theirs, folder = model
    flags = ["--load", folder, *TOKENIZER, "--prompt", PROMPTS[1], "--greedy", "--out-seq-length", 15]
    assert run_tool(TOOL, *flags) == 0
    assert capfd.readouterr().out == f"{PROMPTS[1]} {expected(theirs, PROMPTS[1], 4)}\n"


def test_the_end_of_a_document_ends_a_sample(model: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, folder = model
    flags = ["--greedy", "--max-new-tokens", 20, "--prompt", PROMPTS[0]]
    (whole,) = samples(folder, tmp_path / "out.jsonl", *flags)
    tokens = list(map(int, str(whole["text"]).split()))
    end = max(tokens)
    assert end > 9  # so that the prompt is within a vocabulary that ends with it
    (ended,) = samples(folder, tmp_path / "out.jsonl", *flags, "--vocab-size", end)
    assert ended["tokens"] == tokens[: tokens.index(end) + 1]
    assert list(map(int, str(ended["text"]).split())) == tokens[: tokens.index(end)]
    assert (whole["ended"], ended["ended"]) == (False, True)


def test_a_seed_repeats_whatever_the_batches(model: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, folder = model
    flags = ["--top-k", 20, "--top-p", 0.9, "--temperature", 1.5, "--max-new-tokens", 8, "--prompt", *PROMPTS]
    runs = [
        samples(folder, tmp_path / "out.jsonl", *flags, *more)
        for more in (["--seed", 5], ["--seed", 5, "--batch-size", 1], ["--seed", 50])
    ]
    first, again, other = ([each["tokens"] for each in run] for run in runs)
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", " "], "the prompt has no tokens"),
        (["--prompt", "1 2", "--max-new-tokens", "47"], "pass the 48 positions that the model has learned"),
        (["--prompt", "1 2", "--out-seq-length", "2"], "leaves no room after a prompt of 2 tokens; use 3 or more"),
        (["--prompt", "61"], "NullTokenizer got '61'"),
        (["--prompt", "1", "--temperature", "0"], "--temperature (0) must be above 0"),
        (["--prompt", "1", "--device", "cuda"], "this machine has no GPU"),
        (["--prompt", "1", f"{FPDT}-chunk-size", "0"], "chunk-size (0) must be 1 or more"),
        (["--sample-input-file", "/dev/null"], "has no prompts"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    model: tuple[nn.Module, Path], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert run_tool(TOOL, "--load", model[1], *TOKENIZER, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_ids_that_the_model_does_not_have_are_refused(
    model: tuple[nn.Module, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    larger = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 99]
    assert run_tool(TOOL, "--load", model[1], *larger, "--prompt", "70") == 2
    assert (
        f"token id 70 of the prompt is outside the model's vocabulary, ids 0 to {VOCAB - 1}" in capsys.readouterr().err
    )


def test_without_flags_the_tokenizer_is_that_of_the_training(tmp_path: Path) -> None:
    save("llama", tmp_path)
    config = tmp_path / "config.json"
    flags = {"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer": flags}))
    prompt = ["--prompt", "3 1 4", "--greedy", "--max-new-tokens", 4]
    for name, named in (("trained", []), ("named", TOKENIZER)):
        output = ["--sample-output-file", tmp_path / name]
        assert run_tool(TOOL, "--load", tmp_path, *named, *prompt, *output) == 0
    assert (tmp_path / "trained").read_text() == (tmp_path / "named").read_text()


def test_without_flags_the_tokenizer_is_the_one_next_to_the_weights(tmp_path: Path) -> None:
    save("llama", tmp_path)
    ids = {str(number): number for number in range(VOCAB - 1)} | {"<|endoftext|>": VOCAB - 1}
    tokenizer = tokenizers.Tokenizer(WordLevel(ids, unk_token="0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompt = ["--prompt", "3 1 4", "--greedy", "--max-new-tokens", 4, "--output-format", "jsonl"]
    for name, flags in (("beside", []), ("named", TOKENIZER)):
        output = ["--sample-output-file", tmp_path / name]
        assert run_tool(TOOL, "--load", tmp_path, *flags, *prompt, *output) == 0
    beside, named = (json.loads((tmp_path / name).read_text()) for name in ("beside", "named"))
    assert beside["tokens"] == named["tokens"]


def test_without_a_tokenizer_or_a_model_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("llama", tmp_path / "model")
    assert run_tool(TOOL, "--load", tmp_path / "model", "--prompt", "x") == 2
    assert "has no tokenizer.json; name the tokenizer by --tokenizer-type" in capsys.readouterr().err
    assert run_tool(TOOL, "--load", tmp_path / "nothing", "--prompt", "1") == 2
    assert f"--load ({tmp_path / 'nothing'}) is no folder" in capsys.readouterr().err
    assert run_tool(TOOL, "--load", tmp_path / "nothing", *TOKENIZER, "--prompt", "1") == 2
    assert "no weights" in capsys.readouterr().err
