"""Every launch script passes flags that the program takes, counts GPUs right, and says what it lacks."""

import subprocess
from pathlib import Path

import pytest

from megatron.arguments import parse_args
from megatron.config.checks import validate
from tests.unit.examples.script import PATHS, SCRIPTS, Command, run_script

BY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
SENTENCE_PIECE = {"TOKENIZER_TYPE": "SentencePieceTokenizer", "TOKENIZER_MODEL": "tokenizer.model"}


def complaint(script: Path, bin_folder: Path, **variables: str) -> str:
    """What the script writes before it gives up with exit code 2; one line."""
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        run_script(script, bin_folder=bin_folder, **variables)
    assert refusal.value.returncode == 2
    (line,) = refusal.value.stderr.splitlines()
    return str(line)


def num_processes(command: Command) -> int:
    return int(command.launcher[command.launcher.index("--num_gpus") + 1])


@BY_SCRIPT
@pytest.mark.parametrize("num_gpus", [2, 4, 8])
@pytest.mark.parametrize("scale", ["", "tiny"], ids=["full", "tiny"])
def test_every_flag_is_known_and_they_go_together(tmp_path: Path, script: Path, num_gpus: int, scale: str) -> None:
    scales = {"MODEL_SCALE": scale} if scale else {}
    command = run_script(script, bin_folder=tmp_path, num_gpus_found=num_gpus, **PATHS, **scales)
    config = parse_args(command.flags)
    validate(config, num_processes(command), "cuda")
    assert config.model.seq_length == config.model.max_position_embeddings
    assert config.precision.bf16


@BY_SCRIPT
def test_the_tiny_scale_goes_together_on_a_machine_without_a_gpu(tmp_path: Path, script: Path) -> None:
    command = run_script(script, bin_folder=tmp_path, num_gpus_found=0, MODEL_SCALE="tiny", **PATHS)
    config = parse_args(command.flags)
    assert num_processes(command) == 2
    validate(config, 2, "cpu")
    assert not config.precision.bf16


@BY_SCRIPT
def test_any_length_can_be_set_from_the_environment(tmp_path: Path, script: Path) -> None:
    variables = {"SEQ_LEN": "300000", "OUTPUT": "elsewhere", "SEQUENCE_PARALLEL": "2"}
    command = run_script(script, bin_folder=tmp_path, **PATHS, **variables)
    config = parse_args(command.flags)
    validate(config, 4, "cuda")
    assert config.model.seq_length == 300000
    assert config.parallel.ds_sequence_parallel_size == 2
    assert config.checkpoint.save == config.checkpoint.load == "elsewhere/checkpoints"


@BY_SCRIPT
def test_further_flags_are_passed_on_and_win(tmp_path: Path, script: Path) -> None:
    command = run_script(script, "--lr", "1e-5", "--cpu-optimizer", bin_folder=tmp_path, **PATHS)
    config = parse_args(command.flags)
    assert config.optimizer.lr == 1e-5
    assert config.deepspeed.cpu_optimizer


@BY_SCRIPT
def test_other_tokenizers_and_blended_data_can_be_named(tmp_path: Path, script: Path) -> None:
    command = run_script(script, bin_folder=tmp_path, DATA_PATH="0.3 one 0.7 two", **SENTENCE_PIECE)
    config = parse_args(command.flags)
    validate(config, 4, "cuda")
    assert config.data.data_path == ("0.3", "one", "0.7", "two")
    assert config.tokenizer.tokenizer_model == "tokenizer.model"


@BY_SCRIPT
def test_chosen_gpus_are_left_to_the_launcher(tmp_path: Path, script: Path) -> None:
    command = run_script(script, bin_folder=tmp_path, CUDA_VISIBLE_DEVICES="1,3", **PATHS)
    assert "--num_gpus" not in command.launcher
    assert command.value("--ds-sequence-parallel-size") == "2"


@BY_SCRIPT
def test_every_missing_path_is_named_at_once(tmp_path: Path, script: Path) -> None:
    message = complaint(script, tmp_path, VOCAB_FILE="vocab.json")
    assert message.startswith("DATA_PATH MERGE_FILE not set")
    assert "tools/preprocess_data.py" in message


@BY_SCRIPT
def test_a_machine_without_a_gpu_gets_one_clear_line(tmp_path: Path, script: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        run_script(script, bin_folder=tmp_path, num_gpus_found=0, **PATHS)
    (line,) = refusal.value.stderr.splitlines()
    assert "no GPU found" in line
    assert "MODEL_SCALE=tiny" in line


@BY_SCRIPT
def test_an_unknown_scale_is_refused(tmp_path: Path, script: Path) -> None:
    assert "MODEL_SCALE (huge) must be" in complaint(script, tmp_path, MODEL_SCALE="huge", **PATHS)
