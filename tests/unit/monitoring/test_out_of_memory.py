"""The ledger of who holds what, and the settings that would fit, with errors raised artificially."""

import re
from types import SimpleNamespace

import pytest
import torch

from megatron.arguments import parse_args
from megatron.fpdt.host_pool import HostMemoryError
from megatron.fpdt.store import ChunkStore
from megatron.initialize import GIB
from megatron.launch.execution import plan_of
from megatron.monitoring.out_of_memory import WITHOUT_A_PLAN, Ledger, OutOfMemory, memory_that_ran_out, suggestions
from megatron.planner.hardware import GPUS
from megatron.planner.reach import advice
from tests.unit.launch.test_execution import LLAMA_8B, VOCABULARY

CPU_CONTEXT = SimpleNamespace(
    device=torch.device("cpu"), dtype=torch.float32, host_memory_bytes=GIB, parallel_state=SimpleNamespace(rank=3)
)


def ledger_of_a_run():
    ledger = Ledger(CPU_CONTEXT, lambda: None)
    store = ChunkStore(torch.device("cpu"), offloading=True, host_budget_bytes=2 * GIB)
    chunk = store.empty((GIB // 8,), torch.float32)
    ledger.stream = SimpleNamespace(store=store, chunk=chunk)
    held = {("weights", "cpu"): 3 * GIB, ("weights", "cuda"): GIB, ("optimizer states", "cpu"): 6 * GIB}
    ledger.engine = SimpleNamespace(held_bytes=lambda: held)
    return ledger


@pytest.mark.parametrize(
    "error, memory",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "GPU"),
        (HostMemoryError("the host tier needs at least 3.00 GiB"), "host"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "host"),
        (RuntimeError("CUDA error: out of memory"), "GPU"),
        (MemoryError(), "host"),
    ],
)
def test_whatever_says_that_memory_ran_out_becomes_a_ledger(error, memory):
    with pytest.raises(OutOfMemory) as told, ledger_of_a_run().reporting_out_of_memory():
        raise error
    assert told.value.__cause__ is error
    first, *lines = str(told.value).splitlines()
    said = str(error).splitlines()[0] if str(error) else "no more"
    assert first == f"out of {memory} memory on rank 3: {said}"
    assert lines[0] == "  host memory"
    assert lines[1].startswith("    this process         ")
    assert lines[3:6] == [
        "    weights              3.00 GiB",
        "    optimizer states     6.00 GiB",
        "    host pool            0.50 GiB used, 0.50 GiB allocated, of 2.00 GiB that it may take",
    ]
    assert lines[6:] == ["  what to change:", *(f"    - {line}" for line in WITHOUT_A_PLAN)]


def test_memory_and_plan_become_scalars_of_the_history():
    fitting = plan("H200", 1000)
    estimates = Ledger(CPU_CONTEXT, lambda: fitting).scalars()
    assert estimates["plan/mfu"] == fitting.mfu
    assert estimates["plan/peak_gpu_gib"] == fitting.memory.gpu / GIB
    scalars = ledger_of_a_run().scalars()
    assert scalars.pop("memory/host/process,_rest") >= 0
    assert scalars == {"memory/host/weights": 3.0, "memory/host/optimizer_states": 6.0, "memory/host/host_pool": 0.5}


def test_gpu_memory_is_reported_by_owner(monkeypatch):
    counters = {"mem_get_info": (GIB // 2, 80 * GIB), "memory_reserved": 9 * GIB, "memory_allocated": 8 * GIB,
                "max_memory_allocated": 8.5 * GIB}  # fmt: skip
    for name, value in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    ledger = ledger_of_a_run()
    ledger._context = SimpleNamespace(**vars(CPU_CONTEXT) | {"device": torch.device("cuda", 0)})
    ledger.stream.store.device_tier = SimpleNamespace(used_bytes=2 * GIB)
    assert ledger.lines("GPU", torch.OutOfMemoryError("CUDA out of memory."))[1:9] == [
        "  GPU memory",
        "    of the GPU           80.00 GiB, 0.50 GiB of it free",
        "    not torch's          70.50 GiB: other processes, and a little for CUDA itself",
        "    reserved by torch    9.00 GiB",
        "    in tensors           8.00 GiB, at most 8.50 GiB so far",
        "      weights            1.00 GiB",
        "      chunks             2.00 GiB",
        "      activations, rest  5.00 GiB",
    ]
    owners = {name.removeprefix("memory/gpu/"): gib for name, gib in ledger.scalars().items() if "/gpu/" in name}
    assert owners == {"weights": 1.0, "chunks": 2.0, "activations,_rest": 5.5}  # at the peak


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)), ledger_of_a_run().reporting_out_of_memory():
        raise error
    if isinstance(error, RuntimeError):
        assert memory_that_ran_out(error) is None


def test_before_there_is_a_model_the_ledger_is_short():
    lines = Ledger(CPU_CONTEXT, lambda: None).lines("host", MemoryError())
    assert not any("weights" in line or "host pool" in line for line in lines)


def plan(gpu, host_gib, *flags):
    config = parse_args([*LLAMA_8B, "--ds-sequence-parallel-fpdt-chunk-size", "131072", *flags])
    return plan_of(config, 4, GPUS[gpu], int(host_gib * GIB), VOCABULARY)


def test_what_the_planner_knows_to_be_too_large_gets_its_advice():
    too_large = plan("H100", 1, "--seq-length", "1048576")
    assert not too_large.fits
    assert suggestions(too_large, "host") == advice(too_large)


def test_what_should_have_fitted_gets_the_next_smaller_thing():
    fitting = plan("H200", 1000)
    assert fitting.fits
    first, smaller, shorter = suggestions(fitting, "GPU")
    assert first.startswith("the planner estimates that this run fits")
    assert smaller.startswith("--ds-sequence-parallel-fpdt-chunk-size 65536 needs ")
    assert shorter.startswith("--seq-length 131072 ")
    _, lower, _ = suggestions(fitting, "host")
    needed, instead = re.findall(r"([0-9.]+) GiB", lower)
    assert "--ds-sequence-parallel-fpdt-recompute attention --ds-sequence-parallel-fpdt-checkpoint-interval 5 " in lower
    assert 0 < float(needed) < float(instead) / 2


def test_the_plan_is_in_the_ledger():
    ledger = Ledger(CPU_CONTEXT, lambda: plan("H200", 1000))
    text = "\n".join(ledger.lines("GPU", torch.OutOfMemoryError("CUDA out of memory.")))
    assert "  the planner estimates, per rank\n    GPU                  " in text
    assert " of 139.8 GiB, " in text
    assert "GiB of it for chunks\n  what to change:\n    - the planner estimates" in text
