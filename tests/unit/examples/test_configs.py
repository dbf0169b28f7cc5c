"""Every launch script has a file of the same settings."""

from pathlib import Path

import pytest

from megatron.arguments import parse_args
from tests.unit.examples.script import EXAMPLES, PATHS, SCRIPTS, run_script

FILES = sorted((EXAMPLES / "configs").glob("*.yaml"))


def test_each_script_has_a_file() -> None:
    assert [file.stem for file in FILES] == sorted(script.stem.removeprefix("ds_") for script in SCRIPTS)


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
