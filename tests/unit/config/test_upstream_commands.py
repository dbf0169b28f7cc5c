"""The command lines that Megatron-DeepSpeed's own scripts produce: accepted, or refused for a reason that holds.

upstream_commands.json has the flags of each, its number of ranks, and the DeepSpeed JSON that its script writes.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.arguments import parse_args
from megatron.config import Config, ConfigError, deepspeed_config, validate

COMMANDS: dict[str, Any] = json.loads((Path(__file__).with_name("upstream_commands.json")).read_text())
TRAINING = {name: command for name, command in COMMANDS.items() if not command["program"].startswith("tools/")}
PAGE = (Path(__file__).parents[3] / "docs" / "migrating.md").read_text()
SPREAD = "and --ds-sequence-parallel-size and --zero-stage 3 to shard a model that is too large"

# What refuses a command, in the order in which the advice of one leads to the next; nothing: it runs as it is.
REASONS = {
    "ds_pretrain_gpt_6.7B_fpdt_32k.sh": (),
    "ds_pretrain_gpt_1.3B_seq_parallel_32k.sh": (),
    "finetune_llama: train": ("tensor", "pipeline"),
    "pretrain_llama2_distributed": ("tensor", "pipeline"),
    "rebase/ds_pretrain_gpt_1.3B": ("tensor",),
    "rebase/ds_pretrain_gpt_125M_flashattn": ("tensor", "pipeline"),
    "universal_checkpointing/megatron_gpt/run_bf16": ("tensor", "pipeline"),
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def accepted(command: dict[str, Any], flags: list[str]) -> Config:
    config_file = Path(re.split(r"[ =]", command["flags"].split("--deepspeed_config")[1])[1])
    config_file.parent.mkdir(parents=True, exist_ok=True)
    config_file.write_text(json.dumps(command["deepspeed_json"]))
    config = parse_args(flags)
    validate(config, command["num_ranks"], "cuda")
    return config


def test_every_training_command_has_an_outcome() -> None:
    assert set(REASONS) == set(TRAINING)


@pytest.mark.parametrize("name", TRAINING)
def test_a_command_is_accepted_or_refused_with_advice_that_works(name: str) -> None:
    command, flags = TRAINING[name], TRAINING[name]["flags"].split()
    for kind in REASONS[name]:
        flag = f"--{kind}-model-parallel-size"
        with pytest.raises(ConfigError) as refusal:
            accepted(command, flags)
        told = f"{flag} (2) must be 1, as there is no {kind} parallelism here; use {flag} 1, {SPREAD}"
        assert str(refusal.value) == told
        flags += [flag, "1"]
    config = accepted(command, flags)
    assert deepspeed_config(config, command["num_ranks"])["zero_optimization"]["stage"] >= config.deepspeed.zero_stage


@pytest.mark.parametrize("name", TRAINING)
def test_the_page_on_migrating_has_the_outcome(name: str) -> None:
    refusals = " and ".join(f"`--{kind}-model-parallel-size 1`" for kind in REASONS[name])
    outcome = f"with {refusals}" if refusals else "as it is"
    assert f"| `{name}` | {outcome} |" in PAGE


def test_settings_with_an_effect_are_honored() -> None:
    config = accepted(
        TRAINING["ds_pretrain_gpt_6.7B_fpdt_32k.sh"], TRAINING["ds_pretrain_gpt_6.7B_fpdt_32k.sh"]["flags"].split()
    )
    assert config.precision.loss_scale_window == 500
    assert config.precision.initial_loss_scale == 2.0**11
    assert config.deepspeed.deepspeed_activation_checkpointing
    assert (config.training.micro_batch_size, config.training.global_batch_size) == (2, 1024)
