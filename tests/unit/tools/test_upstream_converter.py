"""Megatron-DeepSpeed's command lines of its converter, run as they are but for the folders and the model's sizes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.arguments import parse_args
from megatron.config import validate
from megatron.tokenizer import pad_vocab_size
from megatron.weights.portable import check_portable
from megatron.weights.safetensors_folder import SafetensorsFolder
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import read_portable, save
from tests.unit.weights.test_megatron_deepspeed import write_layers

TOOL = "hf2megads_weight_converter"
# What finetune_hf_llama/finetune_llama.sh of Megatron-DeepSpeed passes after the folders.
TRAINING = """
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --lr-warmup-iters 2000 --weight-decay 0.1
    --clip-grad 1 --num-layers 2 --hidden-size 32 --num-attention-heads 4 --finetune --ffn-hidden-size 44
    --attention-dropout 0 --hidden-dropout 0 --no-query-key-layer-scaling --disable-bias-linear --normalization rmsnorm
    --use-rotary-position-embeddings --untie-embeddings-and-output-weights --swiglu --seq-length 512
    --max-position-embeddings 512 --micro-batch-size 16 --global-batch-size 256 --train-iters 3500 --lr 2e-5
    --tensorboard-dir tensorboard_output --lr-decay-iters 320000 --lr-decay-style cosine --log-interval 1
    --eval-iters 100 --eval-interval 100 --data-path ./examples_deepspeed/finetune_hf_llama/alpaca_data.json
    --save-interval 1500 --split 100,0,0 --bf16 --zero-stage 0 --tokenizer-type HFTokenizer --tokenizer-model {hf}
    --deepspeed_config ./examples_deepspeed/finetune_hf_llama/ds_config_empty.json --deepspeed
    --distributed-backend nccl --num-workers 0 --no-masked-softmax-fusion --no-bias-gelu-fusion
    --no-bias-dropout-fusion --no-gradient-accumulation-fusion --repeated-dataloader
"""
COMMON = "--hf-ckpt-num-shards 2 --hf-ckpt-dir {hf} --load-mode auto"


def line(tmp_path, converter, training=TRAINING):
    return f"{COMMON} {converter} {training}".format(hf=f"{tmp_path}/hf/", tmp=tmp_path).split()


@pytest.fixture
def model(tmp_path):
    """A LLaMA of transformers, saved."""
    return save("llama-multi-head", tmp_path / "hf")


def test_a_model_goes_there_and_back(tmp_path, capsys, model):
    capsys.readouterr()
    assert run_tool(TOOL, *line(tmp_path, "--save {tmp}/llama-7b-mega-ds-T2P2")) == 0
    notes = [text for text in capsys.readouterr().out.splitlines() if text.startswith("note: ")]
    assert notes[0].startswith("note: tensor- and pipeline-parallel sizes (2 and 2) have no effect on what is written;")
    assert notes[1].startswith("note: not needed for a conversion, passed over: --lr-warmup-iters --weight-decay ")
    portable, weights = read_portable(tmp_path / "llama-7b-mega-ds-T2P2")
    assert portable.padded_vocab_size == weights.shape("head.output_layer.weight")[0] == 128  # as training pads it
    back = "--to-hf-ckpt --load {tmp}/llama-7b-mega-ds-T2P2 --save {tmp}/hf/-hf-out"
    assert run_tool(TOOL, *line(tmp_path, back)) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "-hf-out")
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter), name


def test_what_is_written_is_what_the_training_line_asks_for(tmp_path, model):
    """The flags that describe the model, given as upstream gives them, fit the weights."""
    assert run_tool(TOOL, *line(tmp_path, "--save {tmp}/ours")) == 0
    flags = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 44 --disable-bias-linear
        --normalization rmsnorm --use-rotary-position-embeddings --untie-embeddings-and-output-weights --swiglu
        --seq-length 32 --lr 2e-5 --train-iters 1 --data-path x --tokenizer-type NullTokenizer --vocab-size 60
        --layernorm-epsilon 1e-6 --kv-channels 8"""
    config = parse_args([*flags.split(), "--load", str(tmp_path / "ours")])
    validate(config, 1, "cpu")
    check_portable(tmp_path / "ours", config.model, pad_vocab_size(61, config.model.make_vocab_size_divisible_by))


def test_upstream_s_own_checkpoint_of_four_ranks_goes_to_hugging_face(tmp_path, model):
    assert run_tool(TOOL, "to-megatron", tmp_path / "hf", tmp_path / "ours") == 0
    portable, weights = read_portable(tmp_path / "ours")
    state = {name: weights.get(name) for name in weights.names}
    padded = {n: torch.cat([t, t.mean(0).expand(3, -1)]) if t.shape[0] == 61 else t for n, t in state.items()}
    for rank in range(2):
        write_layers(tmp_path / "T2P2" / "global_step0", portable.model, padded, rank=rank, num_ranks=2)
    (tmp_path / "T2P2" / "latest").write_text("global_step0")
    assert run_tool(TOOL, *line(tmp_path, "--to-hf-ckpt --load {tmp}/T2P2 --save {tmp}/back")) == 0
    back, theirs = SafetensorsFolder(tmp_path / "back"), SafetensorsFolder(tmp_path / "hf")
    assert back.names == theirs.names
    assert all(torch.equal(back.get(name), theirs.get(name)) for name in back.names)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 61


def test_underscores_and_a_divisor_of_the_vocabulary_are_taken(tmp_path, model):
    words = f"--hf_ckpt_dir={tmp_path}/hf --save {tmp_path}/ours --make_vocab_size_divisible_by 64 --num_layers=2"
    assert run_tool(TOOL, *words.split()) == 0
    assert read_portable(tmp_path / "ours")[0].padded_vocab_size == 64


@pytest.mark.parametrize(
    "converter, training, message",
    [
        ("--save {tmp}/out", "--num-layers 3", "--num-layers (3) differs from 2, which {tmp}/hf/ has; use 2, or leave"),
        ("--save {tmp}/out", "--normalization layernorm", "--normalization (layernorm) differs from rmsnorm"),
        ("--save {tmp}/out", "--layernorm-epsilon 1e-5", "--layernorm-epsilon (1e-05) differs from 1e-06"),
        ("--save {tmp}/out", "--rope-theta 5e5", "--rotary-position-embeddings-theta (500000.0) differs from 10000.0"),
        (
            "--save {tmp}/out --load-mode torchbin",
            "",
            "--load-mode (torchbin) reads pytorch_model*.bin, and safetensors",
        ),
        ("--save {tmp}/out --to-hf-ckpt", "", "--to-hf-ckpt needs --load, the checkpoint to convert"),
        ("--save {tmp}/out --to-hf-ckp", "", "--to-hf-ckp is unknown; the converter's flags are"),
        ("", "--bf16", "the following arguments are required: --save"),
        ("--save {tmp}/out", "--tensor-model-parallel-size 0", "'0' must be a whole number, at least 1"),
    ],
)
def test_what_cannot_be_honored_is_refused(tmp_path, capsys, model, converter, training, message):
    try:
        code = run_tool(TOOL, *line(tmp_path, converter, training))
    except SystemExit as end:  # of the parser
        code = end.code
    assert code == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_one_line(tmp_path, capsys):
    assert run_tool(TOOL, *line(tmp_path, "--save {tmp}/out")) == 2
    error = capsys.readouterr().err
    assert "config.json cannot be read" in error
    assert error.count("\n") == 1
