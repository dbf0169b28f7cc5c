"""The search for the longest context, and for what makes a length fit."""

from dataclasses import replace
from itertools import product

import pytest

from megatron.config import Recompute
from megatron.planner.flags import flags_of, flags_to_change
from megatron.planner.hardware import GIB, GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.models import named_model
from megatron.planner.plan import CHUNKS, Plan
from megatron.planner.reach import Variant, advice, fastest_that_fits, longest
from megatron.planner.solver import Open, fastest, with_free_device_memory


def plan_of(model="llama-8b", num_gpus=4, length=2**18, chunk=2**16, machines=None, **changes):
    config, vocabulary = named_model(model, length)
    job = Job(config, vocabulary, num_gpus, chunk, num_gpus, **changes)
    machines = machines or Machines(GPUS["H100"], num_gpus, 8, 1000)
    return Plan(job, machines, machines.gpu.fastest)


def every_way(plan):
    """Every combination at the plan's length, tried one by one."""
    for level, on_host, tokens in product(Recompute, (False, True), CHUNKS):
        length = plan.job.model.seq_length
        chunk = min(tokens * plan.job.num_gpus, length)
        yield with_free_device_memory(
            plan.with_job(replace(plan.job, recompute=level, cpu_optimizer=on_host, chunk_length=chunk))
        )


@pytest.mark.parametrize(
    "machines", [Machines(GPUS["H100"], 1, 8, 200), Machines(GPUS["H200"], 4, 4, 503)], ids=["one", "four"]
)
def test_no_combination_of_a_longer_context_fits(machines):
    plan = plan_of(num_gpus=machines.num_gpus, machines=machines)
    reached = longest(plan)
    assert reached.fits
    length = reached.job.model.seq_length
    assert not any(way.fits for way in every_way(plan.with_job(plan.job.at(length + 1024 * machines.num_gpus))))
    fitting = [way for way in every_way(plan.with_job(plan.job.at(length))) if way.fits]
    assert reached.speed.step <= 1.01 * min(way.speed.step for way in fitting)


def test_remedies_are_combined_for_the_longest_context():
    plan = plan_of(num_gpus=1, machines=Machines(GPUS["H100"], 1, 8, 200))
    reached = longest(plan).job
    assert reached.model.seq_length > 294_912  # which was found by hand
    assert reached.cpu_optimizer
    assert reached.device_memory_bytes > 0
    alone = [replace(reached, cpu_optimizer=False), replace(reached, device_memory_bytes=0)]
    alone += [replace(reached, recompute=Recompute.ALL), replace(reached, chunk_length=2**19)]
    assert not any(plan.with_job(job).fits for job in alone)


@pytest.mark.parametrize("num_gpus, host", [(1, 200), (4, 503)])
def test_a_run_that_is_given_the_flags_for_what_it_does_not_choose_chooses_the_rest(num_gpus, host):
    plan = plan_of(num_gpus=num_gpus, machines=Machines(GPUS["H100"], num_gpus, 8, host))
    plan = plan.with_job(plan.job.at(longest(plan).job.model.seq_length))
    open_settings = Open(chunk=True, device_memory=True)
    found = fastest_that_fits(plan)
    flags = flags_to_change(plan, found, open_settings.flags_of(plan.job))
    assert set(flags) <= {"--cpu-optimizer"}
    chosen = fastest(plan.with_job(replace(plan.job, cpu_optimizer="--cpu-optimizer" in flags)), open_settings)
    assert chosen.fits


@pytest.mark.parametrize(
    "plan, where, words",
    [
        (
            plan_of(length=2**26),
            "host",
            [" GPUs on ", "GiB of host memory per machine", "is the longest"],
        ),
        (plan_of(chunk=2**20, length=2**20), "gpu", ["--ds-sequence-parallel-fpdt-chunk-size "]),
        (plan_of("gpt-13b", zero_stage=1), "gpu", ["--zero-stage 3 "]),
        (plan_of("llama-70b"), "gpu", ["--cpu-optimizer "]),
        (plan_of("llama-8b", 1, machines=Machines(GPUS["RTX-4090"], 1, 8, 64)), "gpu", ["GPUs", "GiB of host"]),
    ],
    ids=["too long", "chunk too large", "not partitioned", "model too large", "GPU too small"],
)
def test_what_does_not_fit_is_told_what_would(plan, where, words):
    assert not plan.fits
    assert getattr(plan, f"fits_{where}") is False
    lines = advice(plan)
    assert all(any(word in line for line in lines) for word in words), lines


def test_beyond_the_longest_context_the_host_memory_that_is_named_is_enough_or_what_is_trained_changes():
    plan = plan_of("gpt-1.3b", 1, machines=Machines(GPUS["RTX-4090"], 1, 1, 64))
    too_long = plan.with_job(plan.job.at(longest(plan).job.model.seq_length + 1024))
    (line,) = (line for line in advice(too_long) if "of host memory" in line)
    gib = int(line.split()[0])
    assert 64 < gib < 70
    enough = replace(too_long, machines=replace(plan.machines, host_memory_gib=gib))
    assert fastest_that_fits(enough)
    smaller = Variant(("--other",), replace(plan.job.model, num_layers=12))
    assert advice(too_long, [smaller])[0].startswith("--other --seq-length")
    assert not advice(replace(enough, job=replace(enough.job, chunk_length=2**20)), [smaller])[0].startswith("--other")


def test_what_fits_needs_no_advice():
    assert plan_of().fits
    assert advice(plan_of()) == []


def test_flags_say_what_the_job_is():
    plan = plan_of(cpu_optimizer=True, device_memory_bytes=3 * GIB, recompute=Recompute.MLP, checkpoint_interval=2)
    assert flags_of(plan)[-4:] == [
        "--ds-sequence-parallel-fpdt-offloading", "--ds-sequence-parallel-fpdt-device-memory 3",
        "--ds-sequence-parallel-fpdt-recompute mlp", "--ds-sequence-parallel-fpdt-checkpoint-interval 2",
    ]  # fmt: skip
