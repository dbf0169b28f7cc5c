"""The launch scripts take the variables of Megatron-DeepSpeed's scripts, and refuse what cannot be honored."""

import subprocess
from pathlib import Path

import pytest

from megatron.arguments import parse_args
from megatron.config.checks import validate
from tests.unit.examples.script import EXAMPLES, PATHS, run_program, run_script

SCRIPT = EXAMPLES / "sequence_parallel/ds_pretrain_gpt_6.7B_fpdt_32k.sh"
# A value for every variable of their scripts that says something here.
THEIRS = {
    "seq_len": "131072", "sp_size": "2", "batch_size": "2", "global_batch_size": "16", "zero_stage": "2",
    "train_tokens_in_billion": "200", "train_samples": "2000000", "lr_warmup_tokens_in_million": "500",
    "lr_decay_tokens_in_billion": "150", "lr_decay_style": "linear", "exit_duration": "30000000", "lr": "3e-4",
    "min_lr": "2e-6", "mp_size": "1", "pp_size": "1", "num_gpus": "8", "log_interval": "7", "eval_iters": "3",
    "eval_interval": "50", "save_interval": "60", "activation_checkpoint": "true", "seed": "5", "init_std": "0.01",
    "num_layers": "24", "hidden_size": "2048", "num_attn_heads": "16", "output_home": "elsewhere",
    "data_path": "pile_text_document", "vocab_path": "gpt2-vocab.json", "merge_path": "gpt2-merges.txt",
}  # fmt: skip


def complaint(bin_folder: Path, **variables: str) -> str:
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        run_script(SCRIPT, bin_folder=bin_folder, **variables)
    return str(refusal.value.stderr)


def test_their_variables_count(tmp_path: Path) -> None:
    config = parse_args(run_script(SCRIPT, bin_folder=tmp_path, **THEIRS).flags)
    model, training, optimizer = config.model, config.training, config.optimizer
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.seq_length) == (24, 2048, 16, 131072)
    assert (training.micro_batch_size, training.global_batch_size, training.seed) == (2, 16, 5)
    assert (training.train_tokens, training.train_samples) == (200 * 10**9, 2_000_000)
    assert (training.eval_iters, training.eval_interval, training.exit_duration_in_mins) == (3, 50, 30_000_000)
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style) == (3e-4, 2e-6, "linear")
    assert (optimizer.lr_warmup_tokens, optimizer.lr_decay_tokens) == (500 * 10**6, 150 * 10**9)
    assert (config.parallel.ds_sequence_parallel_size, config.deepspeed.zero_stage) == (2, 2)
    assert (config.checkpoint.save, config.checkpoint.save_interval) == ("elsewhere/checkpoints", 60)
    assert (config.logging.log_interval, model.init_method_std) == (7, 0.01)
    assert (config.data.data_path, config.tokenizer.vocab_file) == (("pile_text_document",), "gpt2-vocab.json")


def test_the_model_of_the_tutorial_is_theirs(tmp_path: Path) -> None:
    config = parse_args(run_script(SCRIPT, bin_folder=tmp_path, num_gpus_found=4, **PATHS).flags)
    validate(config, 4, "cuda")
    assert (config.model.rotary_percent, config.model.rotary_position_embeddings_theta) == (0.25, 1e8)
    assert not config.model.untie_embeddings_and_output_weights
    assert (config.optimizer.min_lr, config.data.split) == (1e-6, "949,50,1")


def test_two_names_of_one_value_must_agree(tmp_path: Path) -> None:
    told = complaint(tmp_path, **PATHS, lr="3e-4", LR="3e-5")
    assert told == "lr (3e-4) and LR (3e-5) say the same and differ; set one of them\n"
    assert run_script(SCRIPT, bin_folder=tmp_path, **PATHS, lr="3e-5", LR="3e-5").value("--lr") == "3e-5"


@pytest.mark.parametrize("name, value", [("mp_size", "2"), ("pp_size", "4"), ("activation_checkpoint", "false")])
def test_what_is_not_here_is_refused(tmp_path: Path, name: str, value: str) -> None:
    allowed = "true" if value == "false" else "1"
    told = complaint(tmp_path, **PATHS, **{name: value})
    assert told == f"{name} ({value}) must be {allowed} here; set it to that or leave it out\n"


def test_a_dry_run_of_the_recall_example_runs_nothing(tmp_path: Path) -> None:
    script = EXAMPLES / "long_context_eval/recall.sh"
    lines = run_program(script, bin_folder=tmp_path, OUT=str(tmp_path / "out")).stdout.splitlines()
    programs = [Path(line.split()[1]).name for line in lines]
    one = ["make_recall_corpus.py", "pretrain_gpt.py", "eval_long_context.py"]
    assert programs == ["-p", *one, *one]
    assert not (tmp_path / "out").exists()
