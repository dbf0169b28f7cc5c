"""Fine-tuning on conversations: however a run is executed, packed or not, the answers' losses are the same."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launcher import REPOSITORY
from tests.integration.corpus import VOCAB_SIZE
from tests.integration.runs import (
    KEPT,
    MODELS,
    OFFLOADED,
    PLAIN,
    REBUILT,
    SIZES,
    TOKENIZER,
    TRAINING,
    Ranks,
    Run,
    ranks,
    train,
)

SCRIPT = REPOSITORY / "finetune_llama.py"
FLAGS = [*SIZES, *TOKENIZER, *TRAINING]
SETTINGS = ["--train-iters", "5", "--eval-iters", "1", "--eval-interval", "5", "--micro-batch-size", "2"]


def write_conversations(path: Path, lengths: Sequence[int]) -> Path:
    """Write prompts and responses that count upwards; each is `lengths` tokens long, with the one that ends it."""
    random = np.random.default_rng(2)
    with path.open("w") as file:
        for length in lengths:
            words = [str((random.integers(VOCAB_SIZE) + k) % VOCAB_SIZE) for k in range(length - 1)]
            cut = int(random.integers(1, length - 1))
            record = {"prompt": " ".join(words[:cut]), "response": " ".join(words[cut:])}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = np.random.default_rng(4).integers(3, 50, 60)
    return write_conversations(tmp_path_factory.mktemp("conversations") / "lines.jsonl", lengths)


def losses_of(run: Run) -> list[float]:
    return [*run.losses.values(), *run.validation_losses.values(), *run.grad_norms.values()]


@pytest.mark.parametrize("model", MODELS)
def test_every_execution_arrives_at_the_same_losses(conversations: Path, tmp_path: Path, model: str) -> None:
    flags = [*FLAGS, *MODELS[model], *SETTINGS, "--data-path", str(conversations), "--split", "80,20,0"]
    plain = losses_of(train([*flags, *PLAIN], tmp_path / "plain", script=SCRIPT))
    assert len(plain) == 11
    others = {
        "offloaded": ([*OFFLOADED, *ranks(2, 3)], 2),
        "rebuilt, products kept": ([*REBUILT, *KEPT], 1),
        "recomputed": (["--deepspeed-activation-checkpointing", *ranks(2, 1)], 2),
        "four to a sequence": ([*OFFLOADED, *ranks(4, 2)], 4),
    }
    for name, (execution, num_ranks) in others.items():
        run = losses_of(train([*flags, *execution], tmp_path / name, num_ranks, script=SCRIPT))
        assert run == pytest.approx(plain, rel=2e-5), name


@pytest.mark.parametrize("execution", [PLAIN, OFFLOADED], ids=["plain", "offloaded"])
def test_packed_conversations_have_loss_and_gradients_of_those_alone(tmp_path: Path, execution: list[str]) -> None:
    # Four, and never five, go into 65 tokens; one, and never two, into 18.
    path = write_conversations(tmp_path / "lines.jsonl", [14, 15, 16, 14] * 4)
    flags = [*FLAGS, *MODELS["llama"], *execution, "--train-data-path", str(path), "--train-iters", "1"]
    packed = train([*flags, "--global-batch-size", "4"], tmp_path / "packed", script=SCRIPT)
    alone = train([*flags, "--seq-length", "17", "--global-batch-size", "16"], tmp_path / "alone", script=SCRIPT)
    grouped = ["--group-by-length", "--global-batch-size", "16"]
    of_16_tokens = train([*flags, *grouped], tmp_path / "grouped", script=SCRIPT)
    assert "16 sequences of 16 tokens an epoch" in of_16_tokens.output
    assert "16 conversations in 4 sequences an epoch, 9.2 % padding" in packed.output
    assert "16 conversations in 16 sequences" in alone.output
    for run in (packed, of_16_tokens):
        assert run.losses[1] == pytest.approx(alone.losses[1], rel=1e-6)
        assert run.grad_norms[1] == pytest.approx(alone.grad_norms[1], rel=1e-5)


def test_grouped_steps_have_lengths_of_their_own_on_any_ranks_and_after_a_break(
    conversations: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, *MODELS["llama"], *OFFLOADED, "--group-by-length", "--train-iters", "6"]
    flags += ["--train-data-path", str(conversations), "--global-batch-size", "2"]
    saved, half = str(tmp_path / "saved"), ["--exit-interval", "3"]
    alone = train(flags, tmp_path / "alone", script=SCRIPT)
    first = train([*flags, *ranks(2, 3), "--save", saved, *half], tmp_path / "first", 2, script=SCRIPT)
    second = train([*flags, *ranks(2, 3), "--load", saved], tmp_path / "second", 2, script=SCRIPT)
    assert len(set(re.findall(r"sequence length: +(\d+)", alone.output))) > 1
    assert losses_of(first)[:3] + losses_of(second)[:3] == pytest.approx(list(alone.losses.values()), rel=2e-5)


def test_a_run_that_is_resumed_in_a_later_epoch_takes_the_samples_that_it_would_have(
    conversations: Path, tmp_path: Path
) -> None:
    array = tmp_path / "array.json"  # of the same conversations
    array.write_text(json.dumps([json.loads(line) for line in conversations.read_text().splitlines()], indent=2))
    data = ["--train-data-path", str(conversations), "--valid-data-path", str(conversations)]
    flags = [*FLAGS, *MODELS["llama"], *data, "--lr-decay-iters", "20", "--global-batch-size", "8"]
    whole = train([*flags, "--train-data-path", str(array), "--train-iters", "8"], tmp_path / "whole", script=SCRIPT)
    checkpoints = ["--save", str(tmp_path / "saved"), "--load", str(tmp_path / "saved")]
    train([*flags, *checkpoints, "--train-iters", "5"], tmp_path / "first", script=SCRIPT)
    rest = train([*flags, *checkpoints, "--train-iters", "8"], tmp_path / "rest", script=SCRIPT)
    assert rest.losses == {iteration: whole.losses[iteration] for iteration in (6, 7, 8)}


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("finetune_llama.py", ["--seq-length", "20"], ["line ", "longer than --seq-length (20)", "--long-samples"]),
        ("finetune_llama.py", ["--data-path", "absent.jsonl"], ["absent.jsonl is no file", "JSON lines"]),
        ("finetune_llama.py", ["--data-path", str(REPOSITORY / "LICENSE")], ["LICENSE, line 2: not JSON", "repair"]),
        ("finetune_llama.py", ["--eod-mask-loss"], ["--eod-mask-loss is for pretrain_gpt.py", "remove it"]),
        ("finetune_llama.py", ["--chat-template", "x"], ["--chat-template (x) has no effect", "HFTokenizer"]),
        ("finetune_llama.py", ["--rewritten-answers", "skip"], ["--rewritten-answers (skip) has no effect", "HFTok"]),
        ("pretrain_gpt.py", ["--long-samples", "skip"], ["--long-samples has no effect in pretrain_gpt.py"]),
    ],
)
def test_a_mistake_ends_in_one_clear_line(
    conversations: Path, tmp_path: Path, script: str, flags: list[str], words: list[str]
) -> None:
    cache = ["--data-cache-path", str(tmp_path)]
    given = [*FLAGS, *MODELS["llama"], "--data-path", str(conversations), "--train-iters", "1", *cache, *flags]
    with Ranks(given, script=REPOSITORY / script) as run:
        (ended,) = run.wait()
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.exit_code == 2
    assert [word for word in words if word not in line] == [], line
