"""Whole training steps on a GPU: number formats, ZeRO stages, offloads and executions tell the same story."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from megatron.launch.program import NOT_FINITE_EXIT_CODE
from tests.distributed.launcher import REPOSITORY, launch, run_training
from tests.gpu.training_flags import KEPT, OFFLOADED, ON_HOST, STREAMED, training_words
from tests.integration.corpus import write_corpus
from tests.integration.runs import THRIFTY, read_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]

ITERATIONS = 8
POISONED = REPOSITORY / "tests/integration/poisoned.py"
RECOMPUTED = ["--deepspeed-activation-checkpointing", "--checkpoint-in-cpu"]

# bf16 keeps 8 bits: a loss near 4 is known to about 1e-3, and the paths of training part slowly.
TOLERANCE = {"--bf16": 0.03, "--fp16": 0.01}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "counting")


def _losses(corpus, *flags, num_ranks=1, script=REPOSITORY / "pretrain_gpt.py"):
    run = run_training(training_words(corpus, ITERATIONS, *flags), num_ranks, script=script)
    assert len(run.losses) == len(run.grad_norms) == ITERATIONS
    return run.losses


@pytest.fixture(scope="module")
def exact(corpus):
    return _losses(corpus, "--attention-backend", "reference")


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
@pytest.mark.parametrize(
    "flags",
    [[], ["--zero-stage", "1", *RECOMPUTED], ["--zero-stage", "2", *STREAMED], ["--zero-stage", "3", *KEPT]],
    ids=["plain", "stage 1, recomputed", "stage 2, streamed", "stage 3, offloaded, products kept"],
)
def test_half_precision_follows_fp32(corpus, exact, precision, flags):
    losses = _losses(corpus, precision, *flags)
    assert all(abs(losses[i] - exact[i]) < TOLERANCE[precision] for i in exact)


def test_fp32_stream_on_the_gpu_equals_the_plain_model(corpus, exact):
    losses = _losses(corpus, "--attention-backend", "reference", "--zero-stage", "3", *OFFLOADED)
    assert all(abs(losses[i] - exact[i]) < 2e-4 for i in exact)


def test_optimizer_and_parameter_offload_through_the_deepspeed_json(corpus, exact, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": ON_HOST}))
    losses = _losses(corpus, "--bf16", "--deepspeed-config", str(path), *OFFLOADED)
    assert all(abs(losses[i] - exact[i]) < TOLERANCE["--bf16"] for i in exact)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_two_ranks_that_share_a_sequence_tell_the_story_of_one(corpus, exact, stage):
    flags = ["--bf16", "--zero-stage", stage, "--ds-sequence-parallel-size", "2", *KEPT]
    losses = _losses(corpus, *flags, num_ranks=2, script=Path(__file__).with_name("ranks_on_one_gpu.py"))
    assert all(abs(losses[i] - exact[i]) < TOLERANCE["--bf16"] for i in exact)


@pytest.mark.parametrize(
    "num_ranks, flags",
    [
        (2, ["--ds-sequence-parallel-size", "2", "--zero-stage", "3", *KEPT]),
        (4, ["--ds-sequence-parallel-size", "4", "--zero-stage", "3", *OFFLOADED]),
        (4, ["--ds-sequence-parallel-size", "2", "--zero-stage", "2", *STREAMED]),
        (4, ["--ds-sequence-parallel-size", "4", "--zero-stage", "1"]),
    ],
    ids=["2, stage 3, products kept", "4, stage 3, offloaded", "2 x 2, stage 2, streamed", "4, stage 1, plain"],
)
def test_ranks_over_nccl_tell_the_story_of_one(corpus, exact, num_ranks, flags):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    losses = _losses(corpus, "--attention-backend", "reference", *flags, num_ranks=num_ranks)
    assert all(abs(losses[i] - exact[i]) < 2e-4 for i in exact)


@pytest.mark.parametrize("num_heads, num_key_value_heads", [(7, 7), (2, 1)], ids=["uneven heads", "shared rows"])
@pytest.mark.parametrize("flags", [["--zero-stage", "1"], KEPT], ids=["plain", "offloaded"])
def test_four_ranks_that_do_not_divide_the_heads_tell_the_story_of_one(corpus, num_heads, num_key_value_heads, flags):
    heads = ["--num-attention-heads", str(num_heads), "--num-key-value-heads", str(num_key_value_heads)]
    exact = _losses(corpus, "--attention-backend", "reference", *heads, "--kv-channels", "64")
    on_one_gpu = {} if torch.cuda.device_count() >= 4 else {"script": Path(__file__).with_name("ranks_on_one_gpu.py")}
    flags = ["--bf16", "--ds-sequence-parallel-size", "4", *flags, *heads, "--kv-channels", "64"]
    losses = _losses(corpus, *flags, num_ranks=4, **on_one_gpu)
    assert all(abs(losses[i] - exact[i]) < TOLERANCE["--bf16"] for i in exact)


@pytest.mark.parametrize("left_open", ["chunk-size", "device-memory"])
def test_the_planner_chooses_what_is_left_open(corpus, exact, left_open):
    losses = _losses(corpus, "--bf16", *OFFLOADED, f"--ds-sequence-parallel-fpdt-{left_open}", "auto")
    assert all(abs(losses[i] - exact[i]) < TOLERANCE["--bf16"] for i in exact)


def test_a_run_that_leaves_all_open_takes_the_fastest_way(corpus, exact):
    flags = ["--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-fpdt-offloading"]
    losses = _losses(corpus, "--bf16", *flags)
    assert all(abs(losses[i] - exact[i]) < TOLERANCE["--bf16"] for i in exact)


@pytest.mark.parametrize("flags", [[], RECOMPUTED, OFFLOADED], ids=["plain", "recomputed", "offloaded"])
def test_a_run_says_at_start_what_it_is_and_what_it_needs(corpus, flags):
    output = run_training(training_words(corpus, 2, "--bf16", *flags), 1).output
    facts = ("model", "ranks", "batch", "attention", "software", "GPU memory", "host memory", "step", "speed", "time")
    assert {label: output.count(f"\n  {label:<16s} ") for label in facts} == dict.fromkeys(facts, 1)
    assert output.count("\n  link to host ") == (flags == OFFLOADED)


def test_a_model_that_the_gpu_cannot_hold_is_refused_before_it_is_built(corpus):
    large = ["--num-layers", "400", "--hidden-size", "16384", "--num-attention-heads", "128"]
    run = launch(REPOSITORY / "pretrain_gpt.py", training_words(corpus, ITERATIONS, "--bf16", *OFFLOADED, *large), 1)
    assert run.exit_codes == [2]
    assert "GiB of GPU memory per rank" in run.outputs[0]


# Long enough for blocks of keys to race for the sums of dq.
LONG = ["--seq-length", "4096", "--ds-sequence-parallel-fpdt-chunk-size", "1536"]


@pytest.mark.parametrize(
    "kernel, flags",
    [
        ("auto", ["--zero-stage", "1", "--seq-length", "4096", "--hidden-dropout", "0.1"]),
        ("auto", ["--zero-stage", "3", *KEPT, *LONG]),
        ("auto", ["--zero-stage", "3", *KEPT, *LONG, "--reset-position-ids", "--reset-attention-mask"]),
        ("torch-flash", ["--zero-stage", "3", *KEPT, *LONG]),
    ],
    ids=["plain, stage 1", "products kept, stage 3", "documents, stage 3", "torch-flash, stage 3"],
)
def test_a_deterministic_run_repeats_every_bit_and_so_does_its_resumption(corpus, tmp_path, kernel, flags):
    num_ranks = min(torch.cuda.device_count(), 2)
    if KEPT[0] in flags:
        flags = [*flags, "--ds-sequence-parallel-size", str(num_ranks)]
    words = training_words(corpus, 4, "--bf16", "--deterministic-mode", "--attention-backend", kernel, *flags)

    def checkpoints(name, *further):
        run_training([*words, "--save", str(tmp_path / name), "--save-interval", "2", *further], num_ranks)
        return {path.name: read_tensors(path) for path in (tmp_path / name).glob("global_step*")}

    whole, first = checkpoints("whole"), checkpoints("parts", "--exit-interval", "2")
    assert_same_bits(first["global_step2"], whole["global_step2"])
    resumed = checkpoints("parts", "--load", str(tmp_path / "parts"))
    assert_same_bits(resumed["global_step4"], whole["global_step4"])


def test_what_is_saved_and_where_changes_no_bit_of_a_deterministic_run(corpus, tmp_path):
    flags = ["--bf16", "--deterministic-mode", "--zero-stage", "3", *OFFLOADED, *LONG]
    executions = {
        "kept": ["--ds-sequence-parallel-fpdt-recompute", "none"],
        "on the GPU": [
            "--ds-sequence-parallel-fpdt-recompute",
            "none",
            "--ds-sequence-parallel-fpdt-device-memory",
            "1",
        ],
        "recomputed": THRIFTY,
        "with attention": [*THRIFTY, "--ds-sequence-parallel-fpdt-recompute", "attention"],
    }
    tensors = []
    for name, how in executions.items():
        run_training(training_words(corpus, 2, *flags, *how, "--save", str(tmp_path / name)), 1)
        tensors.append(read_tensors(tmp_path / name / "global_step2"))
    for other in tensors[1:]:
        assert_same_bits(other, tensors[0])


def assert_same_bits(tensors, others):
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


@pytest.mark.parametrize(
    "poison, said",
    [
        ("queries", "first value that is not finite is the queries of layer 2 (forward, micro-batch 0, chunk 0"),
        ("gradient", "is the gradient of the input of layer 2 (backward, micro-batch 0, chunk 0: positions 0-160)"),
        ("weights", "rank 0: the weights of layer 2 (layers.1.post_attention_layernorm.weight) are not finite already"),
    ],
)
def test_a_value_that_is_not_finite_is_named(corpus, poison, said):
    flags = training_words(corpus, ITERATIONS, "--bf16", *OFFLOADED)
    run = launch(POISONED, flags, 1, environment={"POISON": f"3 0 {poison}"})
    assert run.exit_codes == [NOT_FINITE_EXIT_CODE]
    assert "error: iteration 3 (samples 8 to 11): the loss or gradient is not finite" in run.outputs[0]
    assert said in run.outputs[0]
