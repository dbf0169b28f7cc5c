"""Every launch script passes flags that the program takes, counts GPUs right, and says what it lacks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.arguments import parse_args
from megatron.config.checks import validate
from tests.unit.examples.script import EXAMPLES, PATHS, SCRIPTS, Command, run_script

BY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
ON_ALL_GPUS = EXAMPLES / "sequence_parallel/ds_pretrain_llama_8B_fpdt_2m.sh"
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
    assert config.checkpoint.save == "elsewhere/checkpoints"


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_lengths_may_be_written_in_k_and_m(tmp_path: Path, scale: str) -> None:
    variables = {"SEQ_LEN": "1.5M", "CHUNK_SIZE": "32k", "MODEL_SCALE": scale}
    command = run_script(ON_ALL_GPUS, bin_folder=tmp_path, **PATHS, **variables)
    assert (command.value("--seq-length"), command.value("--max-position-embeddings")) == ("1572864", "1572864")
    assert command.value("--ds-sequence-parallel-fpdt-chunk-size") == "32768"
    for wrong in ("128KB", "0.3K", "1.5", "1,04"):
        message = complaint(ON_ALL_GPUS, tmp_path, **PATHS | variables | {"SEQ_LEN": wrong})
        assert message == f"SEQ_LEN ({wrong}) is not a number of tokens; give one, such as 131072, 128K or 1M"


@BY_SCRIPT
def test_further_flags_are_passed_on_and_win(tmp_path: Path, script: Path) -> None:
    command = run_script(script, "--lr", "1e-5", "--cpu-optimizer", bin_folder=tmp_path, **PATHS)
    config = parse_args(command.flags)
    assert config.optimizer.lr == 1e-5
    assert config.deepspeed.cpu_optimizer


@BY_SCRIPT
def test_other_tokenizers_and_blended_data_can_be_named(tmp_path: Path, script: Path) -> None:
    command = run_script(script, bin_folder=tmp_path, **PATHS | SENTENCE_PIECE | {"DATA_PATH": "0.3 one 0.7 two"})
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
    tokenizer = "MERGE_FILE" if "gpt" in script.stem else "TOKENIZER_MODEL"
    weights = [] if "pretrain" in script.stem else ["LOAD"]
    assert message.startswith(f"{' '.join([*weights, 'DATA_PATH', tokenizer])} not set")
    assert "tools/preprocess_data.py" in message


def test_weights_are_taken_from_elsewhere_until_the_run_has_saved_its_own(tmp_path: Path) -> None:
    (script,) = (script for script in SCRIPTS if "finetune" in script.stem)
    output = tmp_path / "output"
    checkpoint = parse_args(run_script(script, bin_folder=tmp_path, OUTPUT=str(output), **PATHS).flags).checkpoint
    assert (checkpoint.load, checkpoint.finetune) == (PATHS["LOAD"], True)
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints/latest").write_text("global_step3")
    checkpoint = parse_args(run_script(script, bin_folder=tmp_path, OUTPUT=str(output), **PATHS).flags).checkpoint
    assert (checkpoint.load, checkpoint.finetune) == (f"{output}/checkpoints", False)


WEIGHTS = {
    "weights": "model.safetensors",
    "shards": "model.safetensors.index.json",
    "global_step7": "mp_rank_00_model_states.pt",
    "partitioned": "zero_pp_rank_0_mp_rank_00_model_states.pt",
    "universal": "zero/optimizer_state.pt",
    "checkpoints": "global_step7/manifest.json",
}


@pytest.mark.parametrize("scale", ["", "tiny"], ids=["full", "tiny"])
def test_load_that_finds_nothing_is_refused_in_a_dry_run_too(tmp_path: Path, scale: str) -> None:
    (script,) = (script for script in SCRIPTS if "finetune" in script.stem)
    for name, file in WEIGHTS.items():
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).touch()
    scales = {"MODEL_SCALE": scale} if scale else {}
    for name in ("empty", "typo"):
        (tmp_path / name).mkdir()
    (tmp_path / "typo" / "latest").write_text("absent")
    for good in (*WEIGHTS, "weights/"):
        command = run_script(script, bin_folder=tmp_path, **PATHS | {"LOAD": good} | scales)
        assert command.value("--load") == good
    for bad in ("absent", "empty", "typo", "weights/model.safetensors"):
        message = complaint(script, tmp_path, **PATHS | {"LOAD": bad} | scales)
        assert message.startswith(f"LOAD ({bad}) holds no weights; name a folder of checkpoints")


def test_the_machines_of_a_hostfile_are_counted(tmp_path: Path) -> None:
    script = ON_ALL_GPUS
    hosts = tmp_path / "hostfile"
    hosts.write_text("# two machines\nworker-1 slots=8\nworker-2 slots=8 # as well\n\nworker-3 slots=4\n")

    def launched(**variables: str) -> Command:
        return run_script(script, bin_folder=tmp_path, HOSTFILE=str(hosts), **PATHS, **variables)

    command = launched(NUM_NODES="2")
    assert command.launcher[-6:] == ["--hostfile", str(hosts), "--num_nodes", "2", "--num_gpus", "8"]
    assert command.value("--ds-sequence-parallel-size") == "16"
    assert launched(NUM_GPUS="4").value("--ds-sequence-parallel-size") == "12"
    assert "--hostfile" not in launched(NUM_NODES="1").launcher
    assert "set NUM_GPUS=4" in complaint(script, tmp_path, HOSTFILE=str(hosts), **PATHS)
    assert "use at most 3" in complaint(script, tmp_path, HOSTFILE=str(hosts), NUM_NODES="4", **PATHS)


def test_machines_that_no_hostfile_names_are_refused(tmp_path: Path) -> None:
    hosts = tmp_path / "hostfile"
    message = complaint(ON_ALL_GPUS, tmp_path, HOSTFILE=str(hosts), **PATHS)
    assert message.startswith(f"HOSTFILE ({hosts}) is no file; ")
    hosts.write_text("localhost slots=4\n")
    message = complaint(ON_ALL_GPUS, tmp_path, HOSTFILE=str(hosts), NUM_NODES="2", **PATHS)
    assert message.strip() == (
        f"NUM_NODES (2) is more than the 1 machines of {hosts}; use at most 1, or name each machine in HOSTFILE"
    )
    message = complaint(ON_ALL_GPUS, tmp_path, NUM_NODES="2", NUM_GPUS="4", **PATHS)
    assert "is more than the 0 machines of /job/hostfile; use at most 1, or" in message


def test_a_hostfile_of_one_machine_needs_no_ssh(tmp_path: Path) -> None:
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=4\n")
    assert "--hostfile" not in run_script(ON_ALL_GPUS, bin_folder=tmp_path, HOSTFILE=str(hosts), **PATHS).launcher


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_a_dry_run_prints_the_plan_of_its_flags(tmp_path: Path, script: Path) -> None:
    machine = {"PLAN_GPU": "H100", "PLAN_HOST_MEMORY": "1900", "PYTHON": sys.executable}
    command = run_script(script, bin_folder=tmp_path, num_gpus_found=8, **PATHS, **machine)
    plan, execution = command.plan, "activations recomputed from the host"
    if "fpdt" in script.stem:
        execution = f"chunk {int(command.value('--ds-sequence-parallel-fpdt-chunk-size')):,}"
    assert f"on 8 H100, {FULL_LENGTHS[script.stem]:,} tokens, {execution}" in plan
    assert "GPU memory" in plan
    assert ("it does not fit the GPU" if "70B" in script.stem else "it fits") in plan


def test_a_dry_run_on_an_unknown_gpu_says_how_to_get_a_plan(tmp_path: Path) -> None:
    script = next(script for script in SCRIPTS if "fpdt" in script.stem)
    assert "set PLAN_GPU" in run_script(script, bin_folder=tmp_path, **PATHS).plan


FULL_LENGTHS = {
    "ds_continue_llama_8B_fpdt_512k": 524_288,
    "ds_extend_llama_8B_fpdt_128k": 131_072,
    "ds_extend_llama_8B_fpdt_1m": 1_048_576,
    "ds_finetune_llama_8B_fpdt_128k": 131_072,
    "ds_pretrain_gpt_1.3B_seq_parallel_32k": 32_768,
    "ds_pretrain_gpt_1.3B_ulysses_32k": 32_768,
    "ds_pretrain_gpt_30B_fpdt_32k": 131_072,
    "ds_pretrain_gpt_30B_seq_parallel_32k": 32_768,
    "ds_pretrain_gpt_6.7B_fpdt_256k": 262_144,
    "ds_pretrain_gpt_6.7B_fpdt_32k": 262_144,
    "ds_pretrain_llama_70B_fpdt_4m": 4_194_304,
    "ds_pretrain_llama_8B_fpdt_2m": 2_097_152,
}


@BY_SCRIPT
def test_length_and_size_are_those_of_the_script(tmp_path: Path, script: Path) -> None:
    config = parse_args(run_script(script, bin_folder=tmp_path, num_gpus_found=8, **PATHS).flags)
    assert config.model.seq_length == FULL_LENGTHS[script.stem]
    assert config.parallel.ds_sequence_parallel_fpdt == ("fpdt" in script.stem)
    (billions,) = re.findall(r"_([\d.]+)B_", script.stem)
    vocabulary = 128_256 if "llama" in script.stem else 50_257
    embeddings = vocabulary * config.model.hidden_size * (2 if config.model.untie_embeddings_and_output_weights else 1)
    parameters = config.model.sizes.all_block_weights + embeddings
    assert parameters / 1e9 == pytest.approx(float(billions), rel=0.05)


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
