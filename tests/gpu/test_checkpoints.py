"""Checkpoints on a GPU: a run that stopped goes on as if it had not, as it was laid out or in another layout."""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.launcher import REPOSITORY, TrainingRun, run_training
from tests.gpu.training_flags import KEPT, OFFLOADED, ON_HOST, STREAMED, training_words
from tests.integration.corpus import write_corpus
from tests.unit.tools.tool import run_tool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]

CHANGE, END = 4, 8
# The scale halves at each of the first iterations that overflow and doubles after each two that do not.
SCALED = ["--fp16", "--loss-scale-window", "2", "--initial-loss-scale", str(2**20)]
LAYOUTS = {
    "stage 1, products kept": ["--bf16", "--zero-stage", "1", *KEPT],
    "stage 2, streamed, fp16": [*SCALED, "--zero-stage", "2", *STREAMED],
    "stage 3, offloaded": ["--bf16", "--zero-stage", "3", *OFFLOADED],
    "stage 3, optimizer and weights on the host": ["--bf16", "--zero-stage", "3", *OFFLOADED],
}

# What the sums of a backward kernel that adds in any order leave of four bf16 steps.
TOLERANCE = 3e-3


@dataclass(frozen=True)
class Source:
    """A run to its end, the checkpoint of its middle, and the flags of both."""

    run: TrainingRun
    checkpoints: Path
    flags: Sequence[str]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    corpus = write_corpus(folder / "counting")
    made = {}

    def source(name):
        if name not in made:
            flags = training_words(corpus, END, *LAYOUTS[name])
            if "host" in name:
                path = folder / "deepspeed.json"
                path.write_text(json.dumps({"zero_optimization": ON_HOST}))
                flags = [*flags, "--deepspeed-config", str(path)]
            checkpoints = folder / name.replace(" ", "-")
            run = run_training([*flags, "--save", str(checkpoints), "--save-interval", str(CHANGE)], 1)
            (checkpoints / "latest").write_text(f"global_step{CHANGE}")
            made[name] = Source(run, checkpoints, flags)
        return made[name]

    return source


def _assert_goes_on(source, *flags, num_ranks=1, script=REPOSITORY / "pretrain_gpt.py", tolerance=TOLERANCE):
    load = ["--load", str(source.checkpoints)]
    run = run_training([*source.flags, *load, *flags], num_ranks, script=script)
    assert list(run.losses) == list(range(CHANGE + 1, END + 1))
    for iteration, loss in run.losses.items():
        assert loss == pytest.approx(source.run.losses[iteration], rel=tolerance)
    return run


def _loss_scales(run):
    return re.findall(r"loss scale: *(\S+)", run.output)


@pytest.mark.parametrize("flags", [[], ["--universal-checkpoint"]], ids=["own layout", "any layout"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_goes_on_with_the_state_that_it_had(sources, name, flags):
    source = sources(name)
    run = _assert_goes_on(source, *flags)
    assert run.losses[CHANGE + 1] == source.run.losses[CHANGE + 1]
    assert _loss_scales(run) == _loss_scales(source.run)[CHANGE:]


def test_a_run_goes_on_in_another_stage(sources):
    _assert_goes_on(sources("stage 1, products kept"), "--universal-checkpoint", "--zero-stage", "3")
    _assert_goes_on(sources("stage 3, offloaded"), "--universal-checkpoint", "--zero-stage", "2")


def test_a_run_goes_on_with_two_ranks_that_share_a_sequence(sources):
    script = Path(__file__).with_name("ranks_on_one_gpu.py")
    flags = ["--universal-checkpoint", "--ds-sequence-parallel-size", "2"]
    _assert_goes_on(sources("stage 1, products kept"), *flags, num_ranks=2, script=script, tolerance=1e-2)


@pytest.mark.parametrize("name", ["stage 1, products kept", "stage 3, offloaded"])
def test_a_training_starts_with_portable_weights(sources, tmp_path, name):
    source = sources(name)
    assert run_tool("consolidate_checkpoint", source.checkpoints, tmp_path / "weights", "--dtype", "fp32") == 0
    want = run_training([*source.flags, "--load", str(source.checkpoints), "--finetune"], 1)
    same = run_training([*source.flags, "--load", str(tmp_path / "weights")], 1)
    assert same.losses[1] == want.losses[1]
    assert same.losses == pytest.approx(want.losses, rel=TOLERANCE)
