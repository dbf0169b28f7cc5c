"""The script that fine-tunes a model of Hugging Face: its first loss and its export are those of transformers."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron.arguments import parse_args
from megatron.config import TokenizerConfig, validate
from megatron.finetuning.conversations import Conversation, Message
from tests.distributed.launcher import REPOSITORY, free_port, read_log
from tests.integration.shell import run
from tests.unit.finetuning.conftest import CHATML, chat_of, write_hf_folder
from tests.unit.tokenizer.conftest import bpe_files  # noqa: F401
from tests.unit.weights.small_families import save

SCRIPT = REPOSITORY / "examples_deepspeed/finetune_hf_llama/finetune_llama.sh"
PAIR = ("What does the cat do?", "The cat sat on the mat, and then the other cat sat there.")
VOCAB = 265


@pytest.fixture
def hf_model(tmp_path: Path, bpe_files: tuple[Path, Path]) -> Path:  # noqa: F811
    """Write a tiny LLaMA with a tokenizer that has a chat template."""
    save("llama", tmp_path / "theirs", vocab_size=VOCAB, max_position_embeddings=256, num_key_value_heads=2)
    write_hf_folder(tmp_path / "theirs", bpe_files, CHATML)
    return tmp_path / "theirs"


def their_loss(model_folder: Path, tokenizer_folder: Path) -> float:
    """The loss of the answer in transformers."""
    chat = chat_of(TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(tokenizer_folder)))
    (encoded,) = chat.encoder.encode(Conversation((Message("user", PAIR[0]), Message("assistant", PAIR[1]))))
    tokens = torch.from_numpy(encoded.tokens).long()
    labels = torch.where(torch.from_numpy(encoded.is_answer), tokens, -100)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)(tokens[None]).logits
    return float(F.cross_entropy(logits[0, :-1], labels[1:]))


def settings(hf_model: Path) -> dict[str, str]:
    path = hf_model.parent / "conversations.jsonl"
    path.write_text((json.dumps({"prompt": PAIR[0], "response": PAIR[1]}) + "\n") * 20)
    return {
        "MODEL_SCALE": "tiny", "HF_MODEL": str(hf_model), "DATA_PATH": str(path), "OUTPUT": "out", "SEQ_LEN": "300",
        "CHUNK_SIZE": "100", "TRAIN_TOKENS": "1200", "WARMUP_TOKENS": "0", "EXPORT_DTYPE": "float32", "LR": "1e-2",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip


def test_the_script_converts_trains_and_exports(tmp_path: Path, hf_model: Path) -> None:
    variables = settings(hf_model)
    output = run(str(SCRIPT), tmp_path, **variables)
    training = read_log(output)
    assert list(training.losses) == [1, 2, 3, 4]
    assert training.losses[1] == pytest.approx(their_loss(hf_model, hf_model), rel=1e-5)
    exported = tmp_path / "out/hf_step4"
    assert their_loss(exported, hf_model) < 0.9 * training.losses[1]
    assert training.validation_losses[4] == pytest.approx(their_loss(exported, exported), rel=1e-5)
    again = run(str(SCRIPT), tmp_path, **variables)  # all is there
    assert "nothing to train" in again


def test_a_dry_run_of_one_task_prints_its_command(tmp_path: Path, hf_model: Path) -> None:
    variables = settings(hf_model)
    theirs = {"HF_LLAMA_PATH": variables.pop("HF_MODEL"), "DATASET_PATH": variables.pop("DATA_PATH"), "TP": "1"}
    for task, command in (("convert_hf2mds", "to-megatron"), ("convert_mds2hf", "to-hf")):
        (line,) = run(f"{SCRIPT} {task}", tmp_path, **variables | theirs, DRY_RUN="1").splitlines()
        assert shlex.split(line)[2] == command


def test_a_dry_run_prints_all_three_commands(tmp_path: Path, hf_model: Path) -> None:
    convert, train, export = run(str(SCRIPT), tmp_path, **settings(hf_model), DRY_RUN="1").splitlines()
    assert shlex.split(convert)[2:] == ["to-megatron", str(hf_model), "out/weights"]
    assert shlex.split(export)[2:5] == ["to-hf", "out/checkpoints", "out/hf_stepN"]
    words = shlex.split(train)
    config = parse_args(words[words.index(str(REPOSITORY / "finetune_llama.py")) + 1 :])
    validate(config, 2, "cpu")
    assert (config.model.hidden_size, config.model.seq_length) == (32, 300)
    assert (config.checkpoint.load, config.checkpoint.finetune) == ("out/weights", True)
    assert config.parallel.ds_sequence_parallel_fpdt_offloading
    assert not (tmp_path / "out").exists()


def test_the_sizes_at_full_scale_are_those_of_the_model(tmp_path: Path, hf_model: Path) -> None:
    variables = settings(hf_model) | {"MODEL_SCALE": "full", "NUM_GPUS": "2", "DRY_RUN": "1", "PLAN_GPU": "H100"}
    train = next(line for line in run(str(SCRIPT), tmp_path, **variables).splitlines() if "finetune_llama.py" in line)
    words = shlex.split(train)
    config = parse_args(words[words.index(str(REPOSITORY / "finetune_llama.py")) + 1 :])
    assert (config.model.hidden_size, config.parallel.ds_sequence_parallel_size) == (32, 2)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="HF_MODEL DATA_PATH TOKENIZER_MODEL not set"):
        run(str(SCRIPT), tmp_path)
