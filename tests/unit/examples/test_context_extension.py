"""The stages of a context extension: lengths, GPUs per sequence, chunks, RoPE, and where each takes its weights."""

import shlex
from pathlib import Path

import pytest

from megatron.arguments import parse_args
from megatron.config import Config
from megatron.config.checks import validate
from tests.unit.examples.script import EXAMPLES, PATHS, REPOSITORY, run_program, run_script

FOLDER = EXAMPLES / "context_extension"
STAGES = [FOLDER / f"ds_extend_llama_8B_fpdt_{stage}.sh" for stage in ("128k", "1m")]
THETAS = [8.4e6, 6.9e7]


def stage_config(script: Path, bin_folder: Path, **variables: str) -> Config:
    """The configuration of a stage on eight GPUs."""
    config = parse_args(run_script(script, bin_folder=bin_folder, num_gpus_found=8, **PATHS | variables).flags)
    validate(config, 8, "cuda")
    return config


def extension_configs(bin_folder: Path, **variables: str) -> list[Config]:
    """The configurations of all stages, in order, as the whole extension would start them."""
    commands = run_program(
        FOLDER / "extend_llama_8B_to_1m.sh", bin_folder=bin_folder, num_gpus_found=8, **PATHS | variables
    ).stdout.splitlines()
    program = str(REPOSITORY / "pretrain_gpt.py")
    return [parse_args(words[words.index(program) + 1 :]) for words in map(shlex.split, commands)]


def test_each_stage_has_its_length_ranks_chunk_and_theta(tmp_path: Path) -> None:
    configs = [stage_config(script, tmp_path) for script in STAGES]
    assert [config.model.seq_length for config in configs] == [131_072, 1_048_576]
    assert [config.parallel.ds_sequence_parallel_size for config in configs] == [4, 8]
    assert [config.parallel.ds_sequence_parallel_fpdt_chunk_size for config in configs] == [32_768, 65_536]
    assert [config.model.rotary_position_embeddings_theta for config in configs] == THETAS
    assert {config.model.rope_scaling_type for config in configs} == {"none"}


def test_a_tiny_extension_has_a_folder_of_its_own(tmp_path: Path) -> None:
    def folders(**variables: str) -> list[str | None]:
        return [config.checkpoint.save for config in extension_configs(tmp_path, **variables)]

    full, tiny = folders(DRY_RUN="1"), folders(DRY_RUN="1", MODEL_SCALE="tiny")
    assert full == ["runs/llama_8B_extended/128k/checkpoints", "runs/llama_8B_extended/1m/checkpoints"]
    assert tiny == [folder.replace("extended", "extended_tiny") for folder in full if folder]


def test_theta_grows_as_the_context_does_by_the_rule_of_ntk_aware_scaling() -> None:
    for theta, factor in zip(THETAS, (16, 128), strict=True):
        assert theta == pytest.approx(5e5 * factor ** (128 / 126), rel=0.01)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_scaling_keeps_theta_and_has_the_factor_of_the_stage(tmp_path: Path, kind: str) -> None:
    models = [stage_config(script, tmp_path, ROPE_SCALING=kind).model for script in STAGES]
    assert [model.rope_scaling_factor for model in models] == [16, 128]
    assert {model.rotary_position_embeddings_theta for model in models} == {5e5}
    originals = {model.rope_scaling_original_max_position_embeddings for model in models}
    assert originals == ({None} if kind == "linear" else {8192})


def test_theta_and_factor_can_be_set(tmp_path: Path) -> None:
    settings = {"ROPE_SCALING": "yarn", "ROPE_SCALING_FACTOR": "40", "ROTARY_THETA": "1e6", "ORIGINAL_LEN": "4096"}
    model = stage_config(STAGES[0], tmp_path, **settings).model
    assert (model.rope_scaling_factor, model.rope_scaling_original_max_position_embeddings) == (40, 4096)
    assert model.rotary_position_embeddings_theta == 1e6


def test_rope_may_differ_from_the_weights_loaded_and_not_from_the_stage_s_own(tmp_path: Path) -> None:
    output = tmp_path / "output"
    checkpoint = stage_config(STAGES[0], tmp_path, OUTPUT=str(output)).checkpoint
    assert (checkpoint.load, checkpoint.finetune, checkpoint.change_rope) == (PATHS["LOAD"], True, True)
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints/latest").write_text("global_step3")
    checkpoint = stage_config(STAGES[0], tmp_path, OUTPUT=str(output)).checkpoint
    assert (checkpoint.finetune, checkpoint.change_rope) == (False, False)


def test_each_stage_begins_with_the_weights_of_the_one_before(tmp_path: Path) -> None:
    checkpoints = [config.checkpoint for config in extension_configs(tmp_path, OUTPUT="long")]
    assert [each.load for each in checkpoints] == [PATHS["LOAD"], "long/128k/checkpoints"]
    assert [each.save for each in checkpoints] == ["long/128k/checkpoints", "long/1m/checkpoints"]


def test_a_variable_with_a_stage_s_name_is_for_that_stage(tmp_path: Path) -> None:
    variables = {"LR": "3e-5", "LR_1M": "4e-6", "DATA_PATH_1M": "books", "ROPE_SCALING_128K": "yarn"}
    configs = extension_configs(tmp_path, **variables)
    assert [config.optimizer.lr for config in configs] == [3e-5, 4e-6]
    assert [config.data.data_path for config in configs] == [(PATHS["DATA_PATH"],), ("books",)]
    assert [config.model.rope_scaling_type for config in configs] == ["yarn", "none"]
