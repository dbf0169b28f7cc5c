"""Every launch script has a file of the same settings."""

import shlex
from pathlib import Path

import pytest

from megatron.arguments import parse_args
from tests.unit.examples.script import EXAMPLES, PATHS, SCRIPTS, run_program, run_script
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import save

FILES = sorted((EXAMPLES / "configs").glob("*.yaml"))
HF_SCRIPT = EXAMPLES / "finetune_hf_llama/finetune_llama.sh"
HF_FILE = EXAMPLES / "configs/finetune_hf_llama_fpdt_128k.yaml"


def test_each_script_has_a_file() -> None:
    names = [script.stem.removeprefix("ds_") for script in SCRIPTS]
    assert [file.stem for file in FILES] == sorted([*names, HF_FILE.stem])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_file_has_the_settings_of_its_script(tmp_path: Path, script: Path) -> None:
    file = EXAMPLES / "configs" / f"{script.stem.removeprefix('ds_')}.yaml"
    tokenizer = ("VOCAB_FILE", "MERGE_FILE") if "gpt" in script.stem else ("TOKENIZER_MODEL",)
    named = ("DATA_PATH", *tokenizer, *(() if "pretrain" in script.stem else ("LOAD",)))
    words = [word for name in named for word in (f"--{name.lower()}", PATHS[name])]
    config = parse_args(["--config", str(file), *words])
    num_gpus, variables = config.parallel.ds_sequence_parallel_size, {name: PATHS[name] for name in named}
    command = run_script(script, bin_folder=tmp_path, num_gpus_found=num_gpus, **variables)
    assert config == parse_args(command.flags)
    head = file.read_text()
    assert f" --config examples_deepspeed/configs/{file.name} " in head
    assert f"deepspeed --num_gpus {num_gpus} " in head


def test_the_file_of_a_hugging_face_model_has_the_settings_of_its_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("llama", tmp_path / "model")
    output = run_program(HF_SCRIPT, num_gpus_found=8, bin_folder=tmp_path, HF_MODEL="model", DATA_PATH="chats").stdout
    _, program, flags = output.partition("finetune_llama.py ")
    assert program
    capsys.readouterr()
    assert run_tool("hf2megads_weight_converter", "flags", tmp_path / "model") == 0
    sizes = [*capsys.readouterr().out.split(), "--max-position-embeddings", "128K"]
    words = ["--data-path", "chats", "--tokenizer-model", "model", "--load", "runs/llama_finetuned_hf/weights"]
    config = parse_args(["--config", str(HF_FILE), *sizes, *words])
    assert config == parse_args(shlex.split(flags.splitlines()[0]))
