import gzip
import json
import logging
import re
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from megatron.config.logging import LoggingConfig
from megatron.core.ranges import ATTENTION, COPY_IN, named_range
from megatron.monitoring.kernel_times import Kernel
from megatron.monitoring.profiling import StepProfiler, lines_of, summarize

SECOND = 10**9


def context(rank=0):
    state = SimpleNamespace(rank=rank)
    return SimpleNamespace(parallel_state=state, device=torch.device("cpu"), log=logging.getLogger("profiling test"))


def profiler(folder, start=2, end=4, rank=0, ranks=(0,), kind="pt"):
    settings = LoggingConfig(
        profile=kind, profile_step_start=start, profile_step_end=end, profile_ranks=ranks, profile_dir=str(folder)
    )
    return StepProfiler(settings, context(rank))


def train(profiler, iterations):
    for iteration in iterations:
        with profiler.step(iteration), named_range(f"iteration {iteration}"), named_range(ATTENTION):
            torch.ones(100) @ torch.ones(100)


def ranges_in(trace):
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}


@pytest.mark.parametrize(("kind", "has_stacks"), [("pt", False), ("pt-full", True)])
def test_the_full_kind_alone_has_call_stacks(tmp_path, kind, has_stacks):
    train(profiler(tmp_path, kind=kind), [3, 4])
    text = gzip.decompress((tmp_path / "rank0-iterations-3-4.trace.json.gz").read_bytes()).decode()
    assert ('"python_function"' in text) == has_stacks


def test_iterations_after_the_start_up_to_the_end_are_in_one_trace(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(profiler(tmp_path / "new"), range(1, 7))
    trace, summary = (tmp_path / f"new/rank0-iterations-3-4.{end}" for end in ("trace.json.gz", "summary.json"))
    assert sorted((tmp_path / "new").iterdir()) == [summary, trace]
    assert ranges_in(trace) - {"PyTorch Profiler (0)"} == {"iteration 3", "iteration 4", ATTENTION}
    figures = json.loads(summary.read_text())
    assert figures["iterations"] == [3, 4]
    assert figures["copies"] is None
    assert 0 < figures["seconds_by_kind"][ATTENTION] < figures["seconds"]
    assert "no GPU: seconds of the host" in caplog.text
    assert str(trace) in caplog.text


@pytest.mark.parametrize("settings", [{"kind": None}, {"rank": 1}, {"ranks": (1, 2)}, {"start": 9, "end": 12}])
def test_nothing_is_written_where_nothing_is_asked_for(tmp_path, settings):
    train(profiler(tmp_path, **settings), range(1, 7))
    assert list(tmp_path.iterdir()) == []
    assert named_range("x") is named_range("y")


def test_a_resumed_run_profiles_what_is_left(tmp_path):
    train(profiler(tmp_path), [4, 5])
    assert (tmp_path / "rank0-iterations-4-4.summary.json").is_file()


def test_a_step_that_fails_leaves_its_trace(tmp_path):
    with pytest.raises(ZeroDivisionError), closing(profiler(tmp_path)) as failing, failing.step(3):
        _ = 1 / 0
    assert (tmp_path / "rank0-iterations-3-3.trace.json.gz").is_file()


@pytest.mark.parametrize("ending", ["trace.json.gz", "summary.json"])
def test_a_full_disk_leaves_out_the_timeline_and_no_part_of_it(tmp_path, caplog, ending):
    caplog.set_level(logging.INFO)
    (tmp_path / f"rank0-iterations-3-4.{ending}").symlink_to("/dev/full")
    train(profiler(tmp_path), range(1, 7))
    assert list(tmp_path.iterdir()) == []
    last = caplog.records[-1]
    assert last.levelname == "WARNING"
    assert re.fullmatch(
        r"--profile cannot write .*: No space left on device; training continues without it", last.getMessage()
    )


def test_ranges_within_others_count_once():
    ranges = [
        Kernel("layer 1 forward chunk 0", 0, 10 * SECOND), Kernel(ATTENTION, SECOND, 6 * SECOND),
        Kernel(COPY_IN, 2 * SECOND, SECOND), Kernel(ATTENTION, 8 * SECOND, SECOND),
    ]  # fmt: skip
    assert summarize([], ranges) == {"seconds_by_kind": {"other": 3, ATTENTION: 6, COPY_IN: 1}, "copies": None}


def test_kernels_and_copies_of_a_gpu_are_summed_up_for_a_reader():
    kernels = [Kernel("flash_fwd", 0, 4 * SECOND), Kernel("Memcpy HtoD (Pinned -> Device)", 3 * SECOND, 2 * SECOND)]
    summary = {"iterations": [3, 4], "seconds": 5.0, **summarize(kernels, [])}
    assert summary["copies"] == {"seconds": 2.0, "hidden_share": 0.5}
    assert lines_of(summary) == [
        "profile of iterations 3 to 4: 5.000 s",
        "  attention forward         4.000 s",
        "  copies                    2.000 s",
        "  waiting                   0.000 s",
        "  between GPU and host 2.000 s of copies, 50.0% of them overlapped with compute",
    ]


def test_without_copies_none_are_hidden():
    summary = {"iterations": [1, 1], "seconds": 1.0, **summarize([Kernel("gemm", 0, 1)], [])}
    assert lines_of(summary)[-1] == "  nothing was copied between GPU and host"
