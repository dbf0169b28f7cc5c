"""What a run leaves open is chosen by what the machine can hold, and refused where it can hold nothing of the kind."""

import logging
from types import SimpleNamespace

import pytest
import torch

from megatron.arguments import parse_args
from megatron.config import ConfigError, Recompute
from megatron.core.parallel_state import ParallelState
from megatron.launch.execution import check_gpu_memory, plan_execution, plan_of
from megatron.planner.hardware import GIB, GPUS, gpu_like
from megatron.planner.solver import Open

VOCABULARY = 128_256
LLAMA_8B = [
    *["--num-layers", "32", "--hidden-size", "4096", "--ffn-hidden-size", "14336", "--num-attention-heads", "32"],
    *["--num-key-value-heads", "8", "--seq-length", "262144", "--use-rotary-position-embeddings", "--swiglu"],
    *["--normalization", "rmsnorm", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--bf16"],
    *["--lr", "1e-4", "--train-iters", "10", "--data-path", "corpus", "--vocab-size", "128256", "--zero-stage", "3"],
    *["--ds-sequence-parallel-size", "4", "--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-fpdt-offloading"],
]


def config_of(*flags):
    return parse_args([*LLAMA_8B, *flags])


def choose(*flags, host_gib):
    context = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.bfloat16, host_memory_bytes=int(host_gib * GIB),
        log=logging.getLogger("test"), parallel_state=ParallelState(),
    )  # fmt: skip
    return plan_execution(config_of(*flags), context, VOCABULARY).execution


def test_matmul_results_are_saved_where_the_host_has_room():
    assert choose(host_gib=1000).recompute == Recompute.NONE
    assert choose(host_gib=120).recompute == Recompute.MLP
    assert choose(host_gib=60).recompute == Recompute.ALL
    assert choose(host_gib=1000).checkpoint_interval == 1


@pytest.mark.parametrize(
    ("host_gib", "recompute", "rebuilds_inputs"),
    [
        (36, Recompute.KV, False),
        (30, Recompute.KV, True),
        (20, Recompute.ATTENTION, False),
        (9, Recompute.ATTENTION, True),
    ],
)
def test_with_little_host_memory_kv_are_recomputed_before_block_inputs_and_these_before_attention(
    host_gib, recompute, rebuilds_inputs
):
    execution = choose(host_gib=host_gib)
    assert execution.recompute == recompute
    assert (execution.checkpoint_interval > 1) is rebuilds_inputs


def test_shorter_steps_save_more_where_the_host_has_room_beside_the_longest():
    flags = ["--seq-length-schedule", "64K:5,16K:5,256K"]
    for host_gib, of_longest, at_64k, at_16k in (
        (60, "all", "all", "none"),
        (38, "kv", "kv", "all"),
        (36, *["kv"] * 3),
    ):
        execution = choose(*flags, host_gib=host_gib)
        chosen = {length: str(saving.recompute) for length, saving in execution.by_length.items()}
        assert (str(execution.recompute), chosen) == (of_longest, {65536: at_64k, 16384: at_16k}), host_gib
        assert all(saving.checkpoint_interval == 1 for saving in execution.by_length.values())
        assert all(0 < saving.host_bytes <= execution.host_memory_bytes for saving in execution.by_length.values())
    grouped = choose("--group-by-length", host_gib=1000)
    assert sorted(grouped.by_length) == [2**k for k in range(12, 18)]
    assert choose(host_gib=1000).by_length == {}


def test_explicit_flags_are_honored():
    execution = choose("--ds-sequence-parallel-fpdt-recompute", "mlp", host_gib=1000)
    assert (execution.recompute, execution.checkpoint_interval) == (Recompute.MLP, 1)
    assert choose("--ds-sequence-parallel-fpdt-checkpoint-interval", "4", host_gib=1000).checkpoint_interval == 4


def test_without_offloading_everything_is_recomputed_and_every_input_saved():
    flags = [flag for flag in LLAMA_8B if flag != "--ds-sequence-parallel-fpdt-offloading"]
    context = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, host_memory_bytes=0)
    execution = plan_execution(parse_args(flags), context, VOCABULARY).execution
    assert (execution.recompute, execution.checkpoint_interval) == (Recompute.ALL, 1)


def test_what_the_optimizer_takes_of_the_host_is_not_for_chunks(monkeypatch):
    h200 = gpu_like("NVIDIA H200", 139 * GIB)
    monkeypatch.setattr(
        "megatron.launch.execution.plan_of_run", lambda config, *_: plan_of(config, 4, h200, 200 * GIB, VOCABULARY)
    )
    on_gpu, on_host = (choose(*flags, host_gib=200).host_memory_bytes for flags in ([], ["--cpu-optimizer"]))
    states = plan_of(config_of("--cpu-optimizer"), 4, h200, 200 * GIB, VOCABULARY).memory.host_states
    assert on_gpu == pytest.approx((0.97 * 200 - 2.5) * GIB)
    assert on_gpu - on_host == states > 20 * GIB
    asked = ["--ds-sequence-parallel-fpdt-host-memory", "180", "--cpu-optimizer"]
    assert choose(*asked, host_gib=200).host_memory_bytes == 180 * GIB


@pytest.mark.parametrize("spare_tensors, interval", [(0, 2), (1, 1)])
def test_the_last_tensor_s_place_in_the_device_memory_is_not_counted_on(spare_tensors, interval):
    flags = ["--ds-sequence-parallel-fpdt-device-memory", "10", "--ds-sequence-parallel-fpdt-recompute", "all"]
    shape = plan_of(config_of(*flags), 4, GPUS["H200"], 0, VOCABULARY).job.shape
    gib = (shape.tier_bytes(1, Recompute.ALL) + spare_tensors * shape.attention_bytes) / GIB - 10
    assert (
        choose(*flags, "--ds-sequence-parallel-fpdt-host-memory", str(gib), host_gib=100).checkpoint_interval
        == interval
    )
    plan = plan_of(config_of(*flags), 4, GPUS["H200"], int((gib + 2.5) * GIB), VOCABULARY)
    assert plan.memory.checkpoint_interval == interval


def test_a_refused_choice_of_what_is_saved_names_one_that_fits():
    fits = "so that they are chosen to fit: attention and 2"
    with pytest.raises(ConfigError, match=fits):
        choose("--ds-sequence-parallel-fpdt-recompute", "kv", host_gib=15)


def test_a_sequence_that_the_host_cannot_hold_is_refused_with_one_that_it_can():
    with pytest.raises(ConfigError, match=r"--seq-length \(262144\) take up .* and 4\.85 GiB are free") as refusal:
        choose(host_gib=5)
    longest = int(str(refusal.value).split("use --seq-length ")[1].split()[0])
    choose("--seq-length", str(longest), host_gib=5)
    with pytest.raises(ConfigError):
        choose("--seq-length", str(longest + 4), host_gib=5)


@pytest.mark.parametrize(
    "budget, flag",
    [("free", "--ds-sequence-parallel-fpdt-device-memory"), ("asked", "--ds-sequence-parallel-fpdt-host-memory")],
)
def test_the_memory_that_the_refusal_names_is_enough(budget, flag):
    host = {"free": [], "asked": ["--ds-sequence-parallel-fpdt-host-memory", "5"]}[budget]
    with pytest.raises(ConfigError, match=flag) as refusal:
        choose(*host, host_gib=5)
    enough = float(str(refusal.value).split(f"{flag} to ")[1].split(",")[0])
    choose(flag, str(enough), host_gib=5)
    with pytest.raises(ConfigError):
        choose(flag, str(0.98 * enough), host_gib=5)


@pytest.fixture
def choose_on(monkeypatch):
    """Return a function like `choose`, for GPUs."""

    def choose_on(gpu, *flags, num_gpus=4, host_gib=1000):
        def plan_of_run(config, context, vocabulary, host_memory):
            return plan_of(config, num_gpus, gpu, host_memory, vocabulary)

        monkeypatch.setattr("megatron.launch.execution.plan_of_run", plan_of_run)
        return choose(*flags, host_gib=host_gib)

    return choose_on


@pytest.mark.parametrize("flags", [[], ["--ds-sequence-parallel-fpdt-chunk-size", "auto"]])
def test_a_smaller_gpu_gets_smaller_chunks_and_stores_fewer(choose_on, flags):
    large, medium, small = (
        choose_on(gpu_like("NVIDIA H100 80GB HBM3", int(gib * GIB)), *flags, host_gib=300) for gib in (79, 48, 40)
    )
    assert small.chunk_size < large.chunk_size
    assert large.chunk_size % 4 == small.chunk_size % 4 == 0
    assert 0 < medium.device_budget.total_bytes < large.device_budget.total_bytes < 79 * GIB


def test_a_run_is_streamed_if_chunks_are_asked_for_or_it_does_not_fit_the_gpu_in_one_piece(choose_on):
    short = ["--seq-length", "8192", "--num-layers", "2", "--ds-sequence-parallel-size", "1"]
    for flags, streamed in (
        (short, False),
        ([*short, "--ds-sequence-parallel-fpdt-chunk-size", "4096"], True),
        ([*short, "--ds-sequence-parallel-fpdt-recompute", "none"], True),
        ([], True),
    ):
        assert choose_on(GPUS["H200"], *flags, num_gpus=1 if flags else 4).fpdt is streamed


@pytest.mark.parametrize("gib", ["0", "20"])
def test_device_memory_is_as_asked_or_what_the_gpu_has_free(choose_on, gib):
    asked = choose_on(GPUS["H200"], "--ds-sequence-parallel-fpdt-device-memory", gib)
    assert asked.device_budget.total_bytes == int(gib) * GIB
    chosen = choose_on(GPUS["H200"], "--ds-sequence-parallel-fpdt-device-memory", "auto", "--seq-length", "131072")
    assert chosen.device_budget.total_bytes > 50 * GIB


def test_the_gpu_stores_more_of_shorter_steps(choose_on):
    execution = choose_on(GPUS["H200"], "--seq-length-schedule", "64K:5,256K", host_gib=60)
    (at_64k,) = execution.by_length.values()
    assert at_64k.device_budget.total_bytes > execution.device_budget.total_bytes > 50 * GIB
    assert (at_64k.recompute, at_64k.checkpoint_interval) == (Recompute.NONE, 1)


def test_two_million_tokens_of_an_8b_fit_four_h200_with_503_gib(choose_on):
    """As ds_pretrain_llama_8B_fpdt_2m.sh asks for them."""
    flags = ["--seq-length", "2097152", "--ds-sequence-parallel-fpdt-chunk-size", "65536"]
    execution = choose_on(GPUS["H200"], *flags, host_gib=503 / 4)
    assert execution.fpdt
    assert execution.device_budget.total_bytes > 60 * GIB


def test_where_no_chunk_fits_the_gpu_it_is_refused_with_advice(choose_on):
    with pytest.raises(
        ConfigError, match=r"no chunk of --seq-length \(262144\) fits 4 GPUs of 20\.0 GiB.*--cpu-optimizer"
    ):
        choose_on(gpu_like("NVIDIA A30", 20 * GIB))


def test_a_length_that_a_chunk_size_does_not_fit_into_the_host_is_refused_with_what_would_hold_it(choose_on):
    flags = ["--seq-length", "16777216", "--ds-sequence-parallel-fpdt-chunk-size", "65536"]
    with pytest.raises(ConfigError, match=r"\(16777216\) take up .*; \d+ GPUs.*: --ds-sequence-parallel-size \d+ "):
        choose_on(GPUS["H100"], *flags, host_gib=100)


def test_what_the_gpu_certainly_cannot_hold_is_refused_with_what_would_fit():
    def refuse(gib, *flags):
        config = config_of(*flags)
        plan = plan_of(config, 4, gpu_like("NVIDIA H100", gib * GIB), 1000 * GIB, VOCABULARY)
        check_gpu_memory(plan, Open.of(config))

    refuse(79)
    refuse(12, "--cpu-optimizer", "--ds-sequence-parallel-fpdt-chunk-size", "16384")
    with pytest.raises(ConfigError, match=r"about \d+ GiB of GPU memory per rank, .* has 24\.0 GiB; .*--cpu-optimizer"):
        refuse(24)


def test_the_automatic_chunk_without_a_gpu_is_the_default():
    assert choose("--ds-sequence-parallel-fpdt-chunk-size", "auto", host_gib=1000).chunk_size == 65536


@pytest.mark.parametrize(
    "name, known", [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100-40GB"),
                    ("NVIDIA RTX A6000", "RTX-A6000"), ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA L40S", "L40S"),
                    ("NVIDIA GeForce RTX 4090", "RTX-4090"), ("NVIDIA Quadro", "A100-80GB")]
)  # fmt: skip
def test_gpus_are_known_by_their_names(name, known):
    gpu = gpu_like(name, 48 * GIB)
    assert (gpu.name, gpu.memory_gib) == (GPUS[known].name, 48)
