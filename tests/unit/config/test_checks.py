"""The cross-checks: each rule by its message, and the advice in it by following it."""

import re
from dataclasses import fields

import pytest

from megatron.arguments import parse_args
from megatron.config import ConfigError, config_sections, validate
from megatron.config.rules.effects import EFFECTS
from megatron.config.rules.ranges import RANGES
from tests.unit.config.commands import DATA, GPT, complaint

ROPE = "--use-rotary-position-embeddings"
YARN, FACTOR = "--rope-scaling-type yarn", "--rope-scaling-factor"
FROM_8K = "--rope-scaling-original-max-position-embeddings 8192"
MSCALES = "--rope-scaling-mscale 1 --rope-scaling-mscale-all-dim 0.8"
SP, FPDT = "--ds-sequence-parallel-size", "--ds-sequence-parallel-fpdt"
CHUNK = "--ds-sequence-parallel-fpdt-chunk-size"

CASES = [
    # logging
    ("--profile", 1, "--profile has no folder to write to; add --profile-dir or --tensorboard-dir"),
    (
        "--profile --profile-dir x --profile-step-start 12",
        1,
        "--profile-step-end (12) must be above --profile-step-start (12), after which profiling starts; use "
        "--profile-step-end 14",
    ),
    ("--profile --profile-dir x --profile-ranks 0 2", 2, "--profile-ranks (0 2) must be ranks of this run, 0 to 1;"),
    ("--profile-ranks 1", 2, "--profile-ranks (1) has no effect without --profile; add --profile, or remove"),
    ("--log-loss-by-position equal --eval-iters 0", 1, "has no effect with --eval-iters 0; evaluate"),
    ("--save-hf x", 1, "--save-hf (x) has no effect without --hf-model; convert a checkpoint with"),
    ("--loss-position-buckets 4", 1, "--loss-position-buckets (4) has no effect without --log-loss-by-position"),
    (
        "--rollback-on-loss-spike 2 --save x",
        1,
        "--rollback-on-loss-spike (2) needs --save, --save-interval and --loss-spike-factor; add --save-interval and "
        "--loss-spike-factor",
    ),
    (
        "--rollback-on-loss-spike 2 --save x --save-interval 5 --loss-spike-factor 2 "
        "--no-check-for-nan-in-loss-and-grad",
        1,
        "needs the check that --no-check-for-nan-in-loss-and-grad turns off; remove one of them",
    ),
    ("--rollback-on-loss-spike 0", 1, "--rollback-on-loss-spike (0) must be at least 1"),
    ("--loss-spike-factor 1", 1, "--loss-spike-factor (1) must be above 1"),
    # model
    ("--hidden-size 100", 1, "--hidden-size (100) must be a multiple of --num-attention-heads (8)"),
    ("--num-key-value-heads 3", 1, "--num-key-value-heads (3) must divide --num-attention-heads (8); use 1, 2, 4 or 8"),
    (f"--kv-channels 5 {ROPE}", 1, "the width of a head (5) must be even; use --kv-channels 4 or 6"),
    (
        f"--kv-channels 12 --rotary-percent 0.25 {ROPE}",
        1,
        "dimensions is 3, which must be even and above 0; use --rotary-percent",
    ),
    ("--max-position-embeddings 512", 1, "shorten the sequence to 512 or raise --max-position-embeddings to 1024"),
    (f"--max-position-embeddings 512 {ROPE}", 1, "--seq-length (1024) must be at most --max-position-embeddings (512)"),
    ("--fp16 --bf16", 1, "--fp16 and --bf16 exclude each other"),
    (
        f"--deterministic-mode {FPDT} {CHUNK} auto",
        1,
        f"{CHUNK} auto follows the memory that is free at the start, and another chunk size gives other bits, "
        f"which --deterministic-mode rules out; use {CHUNK} N, for example",
    ),
    ("--attention-backend torch-cpu", 1, "runs on CPUs only, and the device is cuda; use auto"),
    ("--attention-backend cudnn", 1, "computes in bf16 or fp16, and this run is in fp32; add --bf16"),
    ("--attention-backend flash-attn-4", 1, "computes in bf16 or fp16, and this run is in fp32; add --bf16"),
    (f"--attention-dropout 0.1 {FPDT}", 1, "--attention-dropout (0.1) must be 0 with --ds-sequence-parallel-fpdt"),
    (
        "--attention-dropout 0.1 --attention-backend reference",
        1,
        "must be 0 where --attention-backend (reference) is forced",
    ),
    (f"{ROPE} {YARN}", 1, "yarn needs --rope-scaling-factor and --rope-scaling-original-max-position-embeddings,"),
    (f"{ROPE} --rope-scaling-type linear", 1, "--rope-scaling-type linear needs --rope-scaling-factor,"),
    (f"{ROPE} {YARN} {FROM_8K} {FACTOR} 0.5", 1, "--rope-scaling-factor (0.5) must be at least 1"),
    (
        f"{ROPE} --rope-scaling-type dynamic {FACTOR} 2 {FROM_8K} --kv-channels 2",
        1,
        "dynamic needs at least 4 rotated dimensions in each head",
    ),
    (
        f"{ROPE} --rope-scaling-type llama3 {FACTOR} 8 {FROM_8K} --rope-scaling-low-freq-factor 4",
        1,
        "--rope-scaling-high-freq-factor (4) must be above --rope-scaling-low-freq-factor (4); raise",
    ),
    (
        f"{ROPE} {YARN} {FACTOR} 8 {FROM_8K} --rope-scaling-beta-slow 33",
        1,
        "--rope-scaling-beta-fast (32) must be above --rope-scaling-beta-slow (33); raise",
    ),
    (
        f"{ROPE} {YARN} {FACTOR} 8 {FROM_8K} --rope-scaling-mscale 1",
        1,
        "--rope-scaling-mscale (1) has no effect alone; add --rope-scaling-mscale-all-dim, or remove",
    ),
    (
        f"{ROPE} {YARN} {FACTOR} 8 {FROM_8K} {MSCALES} --rope-scaling-attention-factor 1",
        1,
        "--rope-scaling-attention-factor (1) and --rope-scaling-mscale both set the scale of attention",
    ),
    # lengths
    ("--seq-length-schedule 1K", 1, "(1K) must give lengths and how many iterations each is trained at, the last"),
    ("--seq-length-schedule 512,1K", 1, "use for example 32K:1000,128K:500,1M"),
    ("--seq-length-schedule 512:0,1K", 1, "use for example 32K:1000,128K:500,1M"),
    ("--seq-length-schedule 512:5,1K:0", 1, "use for example 32K:1000,128K:500,1M"),
    ("--seq-length-schedule 512:5,1Q", 1, "use for example 32K:1000,128K:500,1M"),
    ("--seq-length-schedule 512:5,1K:5", 1, "the last to the end of the training; use"),
    (f"{SP} 4 --seq-length-schedule 510:5,1K", 4, "510 must be a multiple of --ds-sequence-parallel-size (4) above 0"),
    (
        "--seq-length-schedule 512:5,2K",
        1,
        "the longest length of --seq-length-schedule (512:5,2K) must be --seq-length (1024), for which memory is "
        "planned and at which the run is evaluated; use --seq-length 2048, or",
    ),
    (
        "--group-by-length --train-tokens 100000",
        1,
        "--train-tokens (100000) cannot be planned with --group-by-length, where the tokens of a step depend on the "
        "conversations; use --train-iters or --train-samples",
    ),
    # ranks, chunks, batch
    (f"{SP} 3", 3, "--seq-length (1024) must be a multiple of --ds-sequence-parallel-size (3), as each rank takes"),
    (f"{SP} 4", 6, "must divide the number of ranks (6); start 4 or 8 ranks, or --ds-sequence-parallel-size 1 or 2"),
    (f"{SP} 4", 2, "must divide the number of ranks (2); start 4 ranks, or"),
    (f"{SP} 4 --seq-length 1022", 4, "--seq-length (1022) must be a multiple of --ds-sequence-parallel-size (4)"),
    (f"{SP} 4 --seq-length 1022", 4, "use 1020 or 1024, or --ds-sequence-parallel-size 1 or 2"),
    (
        f"{SP} 4 --seq-length 1022 --max-position-embeddings 1022",
        4,
        "every chunk; use 1020, or --ds-sequence-parallel-size",
    ),
    (
        f"{SP} 4 {FPDT} {CHUNK} 102",
        4,
        "chunk-size (102) must be a multiple of --ds-sequence-parallel-size (4); use 100 or 104, or",
    ),
    (
        f"{SP} 4 --global-batch-size 4",
        6 * 2,
        "--global-batch-size (4) must be a multiple of --micro-batch-size (1) x the",
    ),
    ("--micro-batch-size 3 --global-batch-size 8", 2, "size (2) = 6; use 6 or 12, or --micro-batch-size 1, 2 or 4"),
    ("--tensor-model-parallel-size 2", 2, "must be 1, as there is no tensor parallelism here"),
    ("--pipeline-model-parallel-size 2", 2, "must be 1, as there is no pipeline parallelism here"),
    # flags without effect
    (
        f"{CHUNK} 128",
        1,
        "(128) has no effect without --ds-sequence-parallel-fpdt; add --ds-sequence-parallel-fpdt, or remove",
    ),
    (
        f"{FPDT}-offloading",
        1,
        "--ds-sequence-parallel-fpdt-offloading has no effect without --ds-sequence-parallel-fpdt;",
    ),
    ("--rotary-percent 0.5", 1, "--rotary-percent (0.5) has no effect without --use-rotary-position-embeddings"),
    ("--rotary-position-embeddings-theta 500000", 1, "has no effect without --use-rotary-position-embeddings"),
    ("--openai-gelu --swiglu", 1, "--openai-gelu has no effect with --swiglu"),
    ("--add-qkv-bias", 1, "--add-qkv-bias has no effect without --disable-bias-linear"),
    (f"{YARN} {FACTOR} 8 {FROM_8K}", 1, "--rope-scaling-type (yarn) has no effect without --use-rotary-position-emb"),
    (
        f"{ROPE} {FACTOR} 8",
        1,
        "--rope-scaling-factor (8) has no effect with --rope-scaling-type none; use --rope-scaling-type linear,",
    ),
    (
        f"{ROPE} --rope-scaling-type linear {FACTOR} 8 {FROM_8K}",
        1,
        "(8192) has no effect with --rope-scaling-type linear",
    ),
    (
        f"{ROPE} {YARN} {FACTOR} 8 {FROM_8K} --rope-scaling-low-freq-factor 1",
        1,
        "with --rope-scaling-type yarn; use --rope-scaling-type llama3, or remove --rope-scaling-low-freq-factor",
    ),
    ("--change-rope", 1, "--change-rope has no effect without --load"),
    ("--checkpoint-in-cpu", 1, "has no effect without --deepspeed-activation-checkpointing"),
    (f"--checkpoint-in-cpu {FPDT}", 1, "with FPDT unless --ds-sequence-parallel-fpdt-offloading"),
    ("--loss-scale 128", 1, "--loss-scale (128) has no effect without --fp16; add --fp16, or remove --loss-scale"),
    ("--hysteresis 2", 1, "--hysteresis (2) has no effect without --fp16"),
    ("--fp16 --loss-scale 128 --hysteresis 2", 1, "with --loss-scale, which fixes the loss scale"),
    ("--lr-wsd-decay-iters 5", 1, "has no effect without --lr-decay-style WSD"),
    ("--lr-decay-style constant --min-lr 1e-6", 1, "--min-lr (1e-06) has no effect with --lr-decay-style constant"),
    ("--lr-warmup-init 1e-6", 1, "has no effect without a warm-up"),
    ("--keep-last-n-checkpoints 2", 1, "--keep-last-n-checkpoints (2) has no effect without --save"),
    ("--save x --keep-last-n-checkpoints 0", 1, "--keep-last-n-checkpoints (0) must be at least 1"),
    ("--finetune", 1, "--finetune has no effect without --load"),
    ("--ckpt-step 5", 1, "--ckpt-step (5) has no effect without --load"),
    ("--no-verify-checkpoint", 1, "--no-verify-checkpoint has no effect without --load"),
    ("--allow-unverified-checkpoint", 1, "--allow-unverified-checkpoint has no effect without --load"),
    ("--valid-data-path x", 1, "--valid-data-path (x) has no effect without --train-data-path"),
    ("--wandb-exp-name x", 1, "has no effect without --wandb-project"),
    ("--progress off --heartbeat-seconds 5", 1, "has no effect with --progress off"),
    (
        "--vocab-file x",
        1,
        "--vocab-file (x) has no effect with --tokenizer-type NullTokenizer, which takes --vocab-size",
    ),
    # lengths and data
    ("--train-tokens 5", 1, "--train-tokens (5) must be at least one global batch, 1024; use 1024 or more"),
    (
        "--lr-warmup-iters 5 --lr-warmup-samples 5",
        1,
        "both set the length of the warm-up; keep one of them",
    ),
    (
        "--lr-warmup-iters 5 --lr-warmup-fraction 0.1",
        1,
        "--lr-warmup-iters (5) and --lr-warmup-fraction (0.1) both set",
    ),
    ("--lr-decay-iters 5 --lr-decay-tokens 5", 1, "both set the end of the learning-rate decay"),
    ("--lr-decay-style WSD", 1, "needs the length of its final decay; add one of --lr-wsd-decay-iters"),
    ("--min-lr 1", 1, "--min-lr (1) must be at most --lr (0.0001); lower --min-lr or raise --lr"),
    ("--fp16 --initial-loss-scale 1000", 1, "--initial-loss-scale (1000) must be a power of two; use 512 or 1024"),
    ("--train-data-path x", 1, "both set the training data"),
]


@pytest.mark.parametrize("flags, world_size, message", CASES)
def test_a_broken_rule_is_told_in_one_line(flags, world_size, message):
    told = complaint(flags, world_size)
    assert message in told
    assert "\n" not in told


FINE = [
    (f"{ROPE} --rope-scaling-type linear {FACTOR} 8", 1),
    (f"{ROPE} --rope-scaling-type dynamic {FACTOR} 8 {FROM_8K}", 1),
    (f"{ROPE} --rope-scaling-type llama3 {FACTOR} 8 {FROM_8K} --rope-scaling-high-freq-factor 2", 1),
    (f"{ROPE} {YARN} {FACTOR} 8 {FROM_8K} {MSCALES} --rope-scaling-beta-fast 16", 1),
    (f"{ROPE} {YARN} {FACTOR} 8 {FROM_8K} --rope-scaling-attention-factor 1", 1),
    ("", 1),
    (f"{SP} 2 --num-key-value-heads 1", 4),
    (f"{FPDT} {CHUNK} 384 {FPDT}-offloading {SP} 8 --checkpoint-in-cpu --hidden-dropout 0.1", 8),
    (f"{ROPE} --rotary-percent 0.25 --kv-channels 64 --normalization rmsnorm --swiglu --disable-bias-linear", 1),
    ("--fp16 --loss-scale 128", 1),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 3 --lr-warmup-fraction 0.1 --lr-warmup-init 1e-6", 1),
    ("--checkpoint-activations --checkpoint-in-cpu", 1),
    ("--lr-warmup-iters 0 --lr-warmup-samples 5", 1),
    ("--eval-iters 0 --eval-interval 1000", 1),
]


@pytest.mark.parametrize("flags, world_size", FINE)
def test_settings_that_fit_together_pass(flags, world_size):
    assert complaint(flags, world_size) == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--fp16", "--fp16 needs a GPU, and the device is cpu; use --bf16, or neither for fp32"),
        ("--bf16 --use-flash-attn-v2", "--attention-backend flash-2 needs a GPU"),
        ("--bf16 --use-flash-attn-v3", "--attention-backend flash-attn-3 needs a GPU"),
        ("--bf16 --use-flash-attn-v4", "--attention-backend flash-attn-4 needs a GPU"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_there(flags, message):
    assert message in complaint(flags, device_type="cpu")
    assert complaint(flags, device_type="cuda") == ""


def test_a_missing_training_length_and_missing_data_are_told():
    with pytest.raises(ConfigError, match="the length of the training is missing; add one of --train-iters"):
        validate(parse_args([*GPT, "--data-path", "x"]), 1, "cpu")
    with pytest.raises(ConfigError, match="no dataset is given; add --data-path PREFIX"):
        validate(parse_args([*GPT, "--train-iters", "1"]), 1, "cpu")


@pytest.mark.parametrize("world_size", [1, 5, 6, 8, 12, 24])
@pytest.mark.parametrize("size", [2, 5, 6, 8, 12])
def test_every_suggested_sequence_parallel_size_is_accepted(world_size, size):
    flags = f"--num-attention-heads 12 --hidden-size 48 --seq-length 720 {FPDT} {CHUNK} 90 --global-batch-size 24"
    told = complaint(f"{flags} {SP} {size}", world_size)
    for suggestion in suggested(told, f"{SP} "):
        assert complaint(f"{flags} {SP} {suggestion}", world_size) == "", told


@pytest.mark.parametrize("size", [2, 3, 6, 7, 12])
@pytest.mark.parametrize("chunk", [1, 5, 48000])
def test_every_suggested_chunk_is_accepted(size, chunk):
    flags = f"--num-attention-heads 84 --hidden-size 168 --seq-length 8400 {SP} {size} {FPDT}"
    told = complaint(f"{flags} {CHUNK} {chunk}", size)
    assert bool(told) == bool(chunk % size)
    for suggestion in suggested(told, "; use "):
        assert complaint(f"{flags} {CHUNK} {suggestion}", size) == "", told


@pytest.mark.parametrize("width", [2, 6, 10, 12, 80, 96, 129])
@pytest.mark.parametrize("percent", [0.01, 0.1, 0.33, 0.5, 0.9])
def test_every_suggested_rotary_share_is_accepted(width, percent):
    told = complaint(f"{ROPE} --kv-channels {width} --rotary-percent {percent}")
    for suggestion in suggested(told, "--rotary-percent "):
        assert complaint(f"{ROPE} --kv-channels {width} --rotary-percent {suggestion}") == "", told


@pytest.mark.parametrize("batch, micro_batch, world_size", [(10, 4, 2), (7, 2, 3), (1, 1, 4), (12, 5, 2)])
def test_every_suggested_batch_is_accepted(batch, micro_batch, world_size):
    told = complaint(f"--global-batch-size {batch} --micro-batch-size {micro_batch}", world_size)
    batches, micro_batches = suggested(told, "; use "), suggested(told, "or --micro-batch-size ")
    assert batches
    for suggestion in batches:
        assert complaint(f"--global-batch-size {suggestion} --micro-batch-size {micro_batch}", world_size) == ""
    for suggestion in micro_batches:
        assert complaint(f"--global-batch-size {batch} --micro-batch-size {suggestion}", world_size) == ""


DERIVED = ("--ffn-hidden-size", "--num-key-value-heads", "--kv-channels", "--max-position-embeddings")


def suggested(told: str, before: str) -> list[str]:
    """The numbers that stand after `before`, at its last occurrence that has numbers after it."""
    found = re.findall(re.escape(before) + r"([\d.]+(?:(?:, | or )[\d.]+)*)", told)
    return re.split(", | or ", found[-1]) if found else []


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-layers 0", "--num-layers (0) must be at least 1; use for example --num-layers 1"),
        ("--num-attention-heads 0", "--num-attention-heads (0) must be at least 1"),
        ("--rotary-percent 1.5", "--rotary-percent (1.5) must be above 0 and at most 1"),
        (
            "--hidden-dropout 1",
            "--hidden-dropout (1) must be at least 0 and below 1; use for example --hidden-dropout 0",
        ),
        ("--lr nan", "--lr (nan) must be above 0"),
        ("--micro-batch-size -1", "--micro-batch-size (-1) must be at least 1"),
        (f"{SP} 0", "--ds-sequence-parallel-size (0) must be at least 1"),
        ("--vocab-size 1e18", "--vocab-size (1000000000000000000) must be at most 2147483647"),
        *((f"{name} 0", f"{name} (0) must be at least 1") for name in DERIVED),
    ],
)
def test_a_value_out_of_range_is_told_with_an_example(flags, message):
    assert message in complaint(flags)


def test_the_example_of_a_range_lies_within_it():
    for name, allowed in RANGES.items():
        assert allowed.holds(float(allowed.example.split(",")[0])), name


def test_the_tables_name_settings_that_exist():
    known = {member.name for section in config_sections().values() for member in fields(section)}
    assert set(RANGES) <= known
    assert {name for effect in EFFECTS for name in effect.names} <= known


def fields_of_kind(*kinds):
    kinds = {*kinds, *(f"<class '{kind}'>" for kind in kinds)}
    members = (member for section in config_sections().values() for member in fields(section))
    return {member.name for member in members if str(member.type).split(" | ")[0] in kinds}


def test_every_number_has_a_range_and_no_count_is_unbounded():
    checked_elsewhere = {"tensor_model_parallel_size", "pipeline_model_parallel_size"}
    assert fields_of_kind("int", "float") - set(RANGES) == checked_elsewhere
    counts = fields_of_kind("int") - checked_elsewhere
    assert all(min(RANGES[name].ceiling, RANGES[name].high) < 2**63 for name in counts)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ("--train-samples 3", "--train-samples (3) must be at least one global batch, 4; use 4 or more"),
        ("--train-tokens 4095", "--train-tokens (4095) must be at least one global batch, 4096; use 4096 or more"),
    ],
)
def test_a_training_of_less_than_one_batch_is_refused(length, message):
    words = [*GPT, *DATA, "--global-batch-size", "4", *length.split()]
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(parse_args(words), 1, "cuda")
