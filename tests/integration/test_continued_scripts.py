"""The launch scripts that begin with the weights of another run, through the deepspeed launcher."""

import json
import math
from pathlib import Path

import pytest

from tests.distributed.launcher import REPOSITORY, free_port, read_log
from tests.integration.corpus import VOCAB_SIZE
from tests.integration.launch_scripts import CONTINUED, launch
from tests.integration.shell import run


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, float]:
    """(the checkpoints of a short run of the 8B script at the tiny scale, its last validation loss)"""
    folder = tmp_path_factory.mktemp("pretrained")
    training = launch("ds_pretrain_llama_8B_fpdt_2m", folder, corpus, OUTPUT="out", LR="3e-3", TRAIN_TOKENS="20000")
    return folder / "out/checkpoints", list(training.validation_losses.values())[-1]


def test_a_context_is_extended_in_stages(tmp_path: Path, corpus: Path, pretrained: tuple[Path, float]) -> None:
    checkpoints, _ = pretrained
    script = REPOSITORY / "examples_deepspeed/context_extension/extend_llama_8B_to_1m.sh"
    settings = {
        "MODEL_SCALE": "tiny", "DATA_PATH": str(corpus), "TOKENIZER_TYPE": "NullTokenizer", "LOAD": str(checkpoints),
        "VOCAB_SIZE": str(VOCAB_SIZE), "MASTER_PORT": str(free_port()), "OUTPUT": "out", "LR": "3e-3",
        "SEQ_LEN_128K": "1200", "SEQ_LEN_1M": "2400", "CHUNK_SIZE": "500", "ROPE_SCALING_1M": "yarn",
    }  # fmt: skip
    run(str(script), tmp_path, **settings)
    stages = [tmp_path / "out" / stage / "checkpoints" for stage in ("128k", "1m")]
    first, second = (json.loads((stage / "global_step4/config.json").read_text())["model"] for stage in stages)
    assert (first["seq_length"], second["seq_length"]) == (1200, 2400)
    assert first["rotary_position_embeddings_theta"] == 8_400_000
    assert (second["rope_scaling_type"], second["rope_scaling_factor"]) == ("yarn", 5)
    last = read_log((tmp_path / "out/1m/train.log").read_text())
    assert list(last.losses) == [1, 2, 3, 4]
    assert last.losses[1] < 0.9 * math.log(VOCAB_SIZE)  # what a model knows that has not forgotten everything
    run(str(script), tmp_path, **settings)  # both stages are at their end
    assert [(stage / "latest").read_text() for stage in stages] == ["global_step4"] * 2


@pytest.mark.parametrize("name", CONTINUED)
def test_a_script_begins_with_the_weights_of_another_run(
    tmp_path: Path, corpus: Path, pretrained: tuple[Path, float], name: str
) -> None:
    checkpoints, validation_loss = pretrained
    longer = {"SEQ_LEN": "1200", "TRAIN_TOKENS": "4800", "CHUNK_SIZE": "auto", "ROTARY_THETA": "100000000"}
    training = launch(name, tmp_path, corpus, OUTPUT="out", LOAD=str(checkpoints), **longer)
    assert list(training.losses) == [1, 2, 3, 4]
    assert training.validation_losses[4] < validation_loss + 0.05
