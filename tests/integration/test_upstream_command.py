"""A command of Megatron-DeepSpeed's own scripts, with a small model: it trains, saves, and resumes."""

import json
from pathlib import Path

from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import train
from tests.unit.tokenizer.conftest import bpe_files  # noqa: F401

COMMANDS = json.loads((REPOSITORY / "tests/unit/config/upstream_commands.json").read_text())
BATCH = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}


def test_a_command_trains_and_resumes(
    tmp_path: Path,
    corpus: Path,
    bpe_files: tuple[Path, Path],  # noqa: F811
) -> None:
    command = COMMANDS["universal_checkpointing/megatron_gpt/run_bf16"]
    (tmp_path / "ds.json").write_text(json.dumps(command["deepspeed_json"] | BATCH))
    vocab, merges = map(str, bpe_files)
    flags = [
        *command["flags"].split(),
        *("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
        *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "64"),
        *("--max-position-embeddings", "64", "--global-batch-size", "4", "--eval-interval", "2", "--eval-iters", "1"),
        *("--data-path", str(corpus), "--vocab-file", vocab, "--merge-file", merges),
        *(
            "--deepspeed_config",
            str(tmp_path / "ds.json"),
            "--save",
            str(tmp_path / "s"),
            "--load",
            str(tmp_path / "s"),
        ),
        *("--lr-decay-iters", "4"),
    ]
    first = train([*flags, "--train-iters", "2"], tmp_path / "first", 2)
    second = train([*flags, "--train-iters", "4"], tmp_path / "second", 2)
    assert (list(first.losses), list(second.losses)) == ([1, 2], [3, 4])
    assert second.losses[4] < first.losses[1]
    assert "--loss-scale (12) has no effect with --bf16, which needs no loss scale" in first.output
