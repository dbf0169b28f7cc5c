"""How a run introduces itself: one block, with and without a plan."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, sample_lengths
from megatron.core.disk_rates import DiskRates
from megatron.core.link_rates import LinkRates
from megatron.core.parallel_state import ParallelState
from megatron.launch.execution import plan_execution, plan_of
from megatron.launch.introduction import Introduction
from megatron.planner.hardware import GPUS
from megatron.training.lengths import Lengths
from tests.unit.launch.test_execution import GIB, VOCABULARY, config_of


def introduced(
    config: Config, num_ranks: int, caplog, state: TrainState | None = None, rank: int = 0, **machine: object
) -> list[str]:
    """Return the lines with which a rank introduces the run."""
    machine = {"host_memory_bytes": 1000 * GIB, "disk_rates": None, **machine}
    state = state or TrainState()
    parallel = ParallelState(
        rank=rank, world_size=num_ranks, sequence_parallel_size=config.parallel.ds_sequence_parallel_size
    )
    context = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.bfloat16, parallel_state=parallel,
        log=logging.getLogger("introduction test"), is_first_rank=rank == 0, link=LinkRates(51, 52, 67), **machine,
    )  # fmt: skip
    state.start(sample_lengths(config, num_ranks))
    caplog.set_level(logging.INFO)
    chosen = plan_execution(config, context, VOCABULARY)
    of_model = {"checked": "a small copy", "experts": ""}
    introduction = Introduction(config, context, VOCABULARY, chosen, of_model)
    introduction.log(Lengths.of(config, num_ranks, state), state)
    return caplog.messages


@pytest.fixture
def on_h200(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(
        "megatron.launch.execution.plan_of_run",
        lambda config, context, vocabulary, memory: plan_of(
            config, context.parallel_state.world_size, GPUS["H200"], memory, vocabulary
        ),
    )
    monkeypatch.setattr("megatron.launch.execution.dist.broadcast_object_list", lambda *_, **__: None)
    monkeypatch.setattr("megatron.launch.introduction.attention_kernel", lambda *_: "flash-attn-4")
    monkeypatch.setattr("megatron.launch.introduction.version", lambda package: f"1.2+{package}")


def test_a_planned_run_says_what_it_needs_and_when_it_ends(on_h200, caplog):
    config = config_of("--global-batch-size", "4", "--train-iters", "1000", "--cpu-optimizer")
    lines = introduced(config, 8, caplog)
    assert lines[0] == "execution on 8 H200:"
    text = "\n".join(lines)
    for line in (
        "  model            8.03B parameters, bfloat16: 32 layers of 4,096, 32 query and 8 key/value heads of 128",
        "  checked          a small copy",
        "  ranks            sequence parallel 4 x data parallel 2 on 2 machines, ZeRO-3, optimizer on the host",
        "  batch            1,048,576 tokens: 4 sequences of 262,144, 2 micro-batches on each rank",
        "  attention        flash-attn-4 1.2+flash-attn-4",
        "  software         torch 1.2+torch, DeepSpeed 1.2+deepspeed, transformers 1.2+transformers",
        "  link to host     51.0 GB/s in, 52.0 out, 67.0 both ways together, per GPU with all GPUs copying at once",
        "  training         to iteration 1000: --train-iters (1000) leaves 1000 iterations of 4 samples",
    ):
        assert lines.count(line) == 1, (line, text)
    assert any(line.startswith("  chunk ") and line.endswith("tokens, chosen") for line in lines)
    assert any(line.startswith("  chunks on GPU ") and line.endswith(", chosen") for line in lines)
    assert all(line[:2] == "  " and line[18] == " " != line[19] for line in lines[1:]), text
    assert not any(line.startswith("  experts") for line in lines)
    for label in ("chunk", "chunks on GPU", "recompute", "GPU memory", "host memory", "step", "speed"):
        assert len([line for line in lines if line.startswith(f"  {label:<16s} ")]) == 1, label
    assert re.fullmatch(
        r"  time             about 1\d:\d\d:\d\d, until \w{3} \d\d \w{3} \d{4}, \d\d:\d\d, without evaluation .*",
        lines[-1],
    )


def test_a_run_of_several_lengths_names_the_largest_and_what_each_saves(on_h200, caplog):
    lines = introduced(config_of("--seq-length-schedule", "64K:5,256K"), 4, caplog)
    assert "  batch            up to 262,144 tokens: 1 sequence of up to 262,144" in lines
    (shorter,) = (line for line in lines if line.startswith("  at 65,536 "))
    assert shorter.endswith(" GiB of chunks on the GPU, recompute none, checkpoint interval 1")


@pytest.mark.parametrize(
    "flags", [["--ds-sequence-parallel-fpdt-chunk-size", "64K"], ["--deepspeed-activation-checkpointing"]]
)
def test_the_time_of_a_schedule_is_the_sum_of_what_is_left_of_its_phases(on_h200, caplog, monkeypatch, flags):
    monkeypatch.setattr("megatron.launch.introduction._time", str)
    streams = "-chunk-size" in flags[0]

    def seconds(*changes: str, done: int = 0) -> float:
        caplog.clear()
        config = config_of("--train-iters", "1000", *flags, *changes)
        parallel = replace(
            config.parallel, ds_sequence_parallel_fpdt=streams, ds_sequence_parallel_fpdt_offloading=streams
        )
        state = TrainState(iteration=done, consumed_samples=done, data_samples=done)
        return float(introduced(replace(config, parallel=parallel), 4, caplog, state)[-1].removeprefix("  time "))

    schedule = ("--seq-length-schedule", "64K:400,256K")
    short, long = seconds("--seq-length", "64K") / 1000, seconds() / 1000
    assert short < long / 4
    assert seconds(*schedule) == pytest.approx(400 * short + 600 * long)
    assert seconds(*schedule, done=200) == pytest.approx(200 * short + 600 * long)
    assert seconds(*schedule, done=700) == pytest.approx(300 * long)
    assert seconds(*schedule, "--train-tokens", "33554432") == pytest.approx(400 * short + 28 * long)


def test_steps_as_long_as_their_conversations_take_at_most_the_time_of_the_longest(on_h200, caplog):
    lines = introduced(config_of("--group-by-length"), 4, caplog)
    assert lines[-1].startswith("  time             at most about ")


def test_a_run_without_a_plan_says_how_it_executes(caplog):
    config = config_of("--ds-sequence-parallel-size", "64", "--seq-length", "1048576")
    lines = introduced(config, 64, caplog)
    assert lines[0] == "execution on 64 CPU ranks:"
    assert "; 32 heads over 64 ranks: 1 on each, with 1/2 of each chunk's queries" in "\n".join(lines)
    assert not any(line.startswith(("  GPU memory", "  time")) for line in lines)


@pytest.mark.parametrize("host_gib", [16, 1000])
def test_a_run_with_a_disk_says_what_goes_there_and_how_fast(caplog, host_gib):
    flags = ("--ds-sequence-parallel-fpdt-disk", "/nvme", "--ds-sequence-parallel-fpdt-disk-memory", "500")
    lines = introduced(config_of(*flags), 4, caplog, host_memory_bytes=host_gib * GIB, disk_rates=DiskRates(5, 3))
    (rates,) = (line for line in lines if line.startswith("  disk rates       5.00 GB/s read, 3.00 written"))
    stored = [line for line in lines if re.match(r"  (disk|host memory) +\d+\.\d{3} GiB ", line)]
    assert rates.endswith(
        "500 GiB may be used per rank" if host_gib == 16 else "not used: the host has room for all chunks"
    )
    assert ["staging memory" in "".join(stored), len(stored)] == ([True, 2] if host_gib == 16 else [False, 1])


def test_other_ranks_are_silent(caplog):
    assert introduced(config_of(), 4, caplog, rank=1) == []
