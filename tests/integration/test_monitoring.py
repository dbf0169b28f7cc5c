"""What a person sees of a run: losses by position, curves, a timeline, and warnings."""

import gzip
import json
import re
from pathlib import Path

import pytest

from megatron.logging.run_history import read_run
from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import OFFLOADED, SEQ_LENGTH, Ranks, base_flags, ranks, train
from tests.unit.tools.tool import run_tool

EVALUATION = ["--train-iters", "4", "--eval-interval", "2", "--eval-iters", "2", "--log-interval", "4"]


def test_losses_by_position_make_up_the_validation_loss_and_are_drawn(corpus: Path, tmp_path: Path) -> None:
    flags = [*base_flags(corpus), *EVALUATION, *OFFLOADED, *ranks(2, 3), "--log-loss-by-position", "equal"]
    output = train([*flags, "--loss-position-buckets", "4"], tmp_path / "run", 2).output
    (tmp_path / "train.log").write_text(output)
    for run in (read_run(tmp_path / "run"), read_run(tmp_path / "train.log")):
        buckets, losses = run.positions(), run.series["validation/loss"]
        assert [bucket.end - bucket.first for bucket in buckets] == [SEQ_LENGTH // 4] * 4
        assert sum(bucket.loss for bucket in buckets) / 4 == pytest.approx(losses[4], rel=2e-6)
        assert list(losses) == [2, 4]
        assert run.train("consumed_tokens") == {4: 4 * 4 * SEQ_LENGTH}
        assert run.train("host_pool_gib")[4] >= 0
    assert run_tool("plot_run", tmp_path / "run", tmp_path / "train.log", "--output", tmp_path / "run.png") == 0
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_a_timeline_names_layers_chunks_and_kinds_of_work(corpus: Path, tmp_path: Path) -> None:
    flags = [*base_flags(corpus), "--train-iters", "3", *OFFLOADED, *ranks(2, 3), "--profile", "--profile-ranks", "1"]
    train([*flags, "--profile-step-start", "1", "--profile-step-end", "9"], tmp_path, 2)
    with gzip.open(tmp_path / "rank1-iterations-2-3.trace.json.gz", "rt") as trace:
        names = {event["name"] for event in json.load(trace)["traceEvents"] if event.get("cat") == "user_annotation"}
    assert names >= {"forward", "backward", "optimizer", "attention", "token-wise", "all-to-all", "copy in", "copy out"}
    chunks = {f"layer {n} {phase} chunk {i}" for n in (1, 2) for phase in ("forward", "backward") for i in range(3)}
    assert {name for name in names if name.startswith("layer")} == chunks
    summary = json.loads((tmp_path / "rank1-iterations-2-3.summary.json").read_text())
    assert summary["seconds_by_kind"]["attention"] > 0


def test_memory_that_runs_out_is_told_with_who_holds_what(corpus: Path) -> None:
    flags = [*base_flags(corpus), "--train-iters", "9", *OFFLOADED, *ranks(1, 3)]
    with Ranks(flags, script=REPOSITORY / "tests/integration/out_of_memory.py") as run:
        (ended,) = run.wait()
    assert ended.exit_code == 2
    held = dict(re.findall(r"held (.+) on cpu: (\d+)", ended.stdout))
    parameters = int(re.findall(r"parameters: (\d+)", ended.stdout)[0])
    # Small ones stay whole beside their shards; Adam's two moments and DeepSpeed's fp32 weights, and a step count.
    assert 4 * parameters <= int(held["weights"]) <= 2.1 * 4 * parameters
    assert int(held["optimizer states"]) // 12 == parameters
    assert ended.stderr.count("error: out of GPU memory on rank 0: CUDA out of memory. Tried to allocate 2.00 GiB") == 1
    for line in ("host memory", "weights", "optimizer states", "host pool", "what to change"):
        assert f"  {line}" in ended.stderr
