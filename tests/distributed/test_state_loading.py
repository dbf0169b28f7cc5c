"""What a checkpoint holds is what the engine held, and goes into an engine of another layout, bit for bit."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from megatron.weights.deepspeed_checkpoint import open_deepspeed_checkpoint
from megatron.weights.errors import WeightsError
from megatron.weights.opening import open_state
from megatron.weights.portable import write_portable
from megatron.weights.source import MOMENTS, WEIGHTS, StateSource
from megatron.weights.universal_checkpoint import UniversalCheckpoint, write_universal_checkpoint
from tests.distributed.engine_case import FROZEN, TAG, TIED, Layout, State, Trained, errors, load, train_and_save
from tests.distributed.rank_pool import RankPool

pytestmark = pytest.mark.slow

NUM_RANKS = (1, 2, 3)
# In half precision stage 0 runs as stage 1.
SAVED = [
    Layout(num_ranks, stage, bf16)
    for num_ranks in NUM_RANKS
    for stage in range(4)
    for bf16 in (False, True)
    if stage or not bf16
]
# As a billion parameters and more of a rank are kept.
SAVED += [Layout(1, 3, step_group=50), Layout(2, 3, step_group=20)]
ROUND_ROBIN, ALIGNED, ELASTIC = "round_robin_gradients", "parameter_alignment", "elastic_checkpoint"
SAVED += [Layout(2, 1, switch=ROUND_ROBIN), Layout(2, 2, bf16=True, switch=ROUND_ROBIN)]
SAVED += [Layout(2, 2, switch=ALIGNED), Layout(2, 1, switch=ELASTIC)]
# Every stage into every stage, every number of ranks into every other, both formats.
CHANGES = [
    (Layout(1, 0), Layout(2, 3)),
    (Layout(1, 1), Layout(2, 2)),
    (Layout(1, 1), Layout(3, 0)),
    (Layout(1, 2), Layout(2, 1)),
    (Layout(1, 3), Layout(3, 3)),
    (Layout(2, 0), Layout(3, 2)),
    (Layout(2, 1), Layout(1, 0)),
    (Layout(2, 1), Layout(3, 3)),
    (Layout(2, 2), Layout(3, 3)),
    (Layout(2, 3), Layout(1, 2)),
    (Layout(2, 3), Layout(2, 0)),
    (Layout(3, 0), Layout(2, 1)),
    (Layout(3, 3), Layout(2, 1)),
    (Layout(3, 1), Layout(3, 1)),
    (Layout(2, 3, bf16=True), Layout(3, 1, bf16=True)),
    (Layout(3, 2, bf16=True), Layout(2, 3, bf16=True)),
    (Layout(2, 1, bf16=True), Layout(2, 3)),
    (Layout(2, 1), Layout(1, 1, bf16=True)),
    (Layout(2, 3, step_group=20), Layout(3, 3)),
    (Layout(1, 3, step_group=50), Layout(2, 3, step_group=20)),
    (Layout(2, 2), Layout(1, 3, step_group=50)),
    (Layout(2, 1), Layout(2, 1, switch=ROUND_ROBIN)),
    (Layout(2, 1, switch=ROUND_ROBIN), Layout(2, 1)),
    (Layout(2, 1, switch=ROUND_ROBIN), Layout(2, 1, switch=ROUND_ROBIN)),
    (Layout(2, 2, bf16=True, switch=ROUND_ROBIN), Layout(3, 3, bf16=True)),
    (Layout(1, 0), Layout(2, 2, switch=ROUND_ROBIN)),
    (Layout(2, 2, switch=ALIGNED), Layout(2, 1, switch=ROUND_ROBIN)),
    (Layout(2, 3), Layout(2, 2, switch=ALIGNED)),
    (Layout(2, 1, switch=ELASTIC), Layout(2, 2, switch=ELASTIC)),
    (Layout(2, 1, switch=ELASTIC), Layout(3, 3)),
]


@dataclass(frozen=True)
class Loaded:
    """What came of loading a checkpoint whole, and of loading its weights alone."""

    whole: Trained
    weights_alone: Trained


def path_of(folder: Path, layout: Layout) -> Path:
    return folder / str(layout) / TAG


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[Layout, Trained]:
    """Train and save in every layout."""
    results: dict[Layout, Trained] = {}
    for num_ranks in NUM_RANKS:
        layouts = [layout for layout in SAVED if layout.num_ranks == num_ranks]
        with RankPool() as pool:
            trained = pool.run(train_and_save, layouts, folder, num_ranks=num_ranks, timeout_seconds=300)[0]
        results |= zip(layouts, trained, strict=True)
    return results


@pytest.fixture(scope="module")
def loaded(folder: Path, saved: dict[Layout, Trained]) -> dict[tuple[Layout, Layout], Loaded]:
    """Make every change of layout."""
    results = {}
    for num_ranks in NUM_RANKS:
        changes = [(source, target) for source, target in CHANGES if target.num_ranks == num_ranks]
        jobs = [(path_of(folder, source), target, whole) for source, target in changes for whole in (True, False)]
        with RankPool() as pool:
            trained = pool.run(load, jobs, num_ranks=num_ranks, timeout_seconds=300)[0]
        for change, whole, weights_alone in zip(changes, trained[::2], trained[1::2], strict=True):
            results[change] = Loaded(whole, weights_alone)
    return results


def whole(source: StateSource) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (name, part, tensor) for everything that a source has."""
    for name in source.names:
        shape = source.shape(name)
        for part in source.parts(name):
            yield name, part, source.read(name, part, 0, torch.Size(shape).numel()).view(shape)


def assert_equal(source: StateSource, state: State) -> None:
    found: State = {}
    for name, part, tensor in whole(source):
        found.setdefault(name, {})[part] = tensor
    assert {name: set(parts) for name, parts in found.items()} == {name: set(parts) for name, parts in state.items()}
    different = [(n, p) for n, parts in state.items() for p in parts if not torch.equal(found[n][p], parts[p])]
    assert different == []


@pytest.mark.parametrize("layout", SAVED, ids=str)
def test_a_checkpoint_holds_what_the_engine_held(folder: Path, saved: dict[Layout, Trained], layout: Layout) -> None:
    checkpoint = open_deepspeed_checkpoint(path_of(folder, layout))
    assert_equal(checkpoint, saved[layout].state)
    assert checkpoint.parts(FROZEN) == (WEIGHTS,)
    assert (checkpoint.zero_stage, checkpoint.step) == (layout.zero_stage, 2)
    assert checkpoint.aliases == {TIED: "embedding.weight"}
    for name, tensor in saved[layout].state.items():
        assert torch.equal(checkpoint.get(name), tensor[WEIGHTS])
        assert checkpoint.dtype(name) == tensor[WEIGHTS].dtype
        if layout.zero_stage < 3:
            assert torch.equal(checkpoint.module_weights(name), saved[layout].module[name])


@pytest.mark.parametrize("layout", [Layout(3, 1), Layout(3, 3)], ids=str)
def test_any_run_of_elements_is_read(folder: Path, saved: dict[Layout, Trained], layout: Layout) -> None:
    checkpoint = open_deepspeed_checkpoint(path_of(folder, layout))
    want = saved[layout].state["embedding.weight"]["exp_avg"].flatten()
    for start in range(0, want.numel(), 5):
        for count in (0, 1, 26, want.numel() - start):
            assert torch.equal(
                checkpoint.read("embedding.weight", "exp_avg", start, min(count, want.numel() - start)),
                want[start : start + count],
            )


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}-to-{change[1]}")
def test_an_engine_of_another_layout_takes_over_what_the_checkpoint_holds(
    saved: dict[Layout, Trained], loaded: dict[tuple[Layout, Layout], Loaded], change: tuple[Layout, Layout]
) -> None:
    source, target = change
    want, got = saved[source], loaded[change].whole
    for name, parts in want.state.items():
        for part, tensor in parts.items():
            assert torch.equal(got.state[name][part], tensor.to(got.state[name][part].dtype)), (name, part)
        master = parts[WEIGHTS]
        dtype = torch.bfloat16 if target.bf16 else torch.float32
        for trained in (got, loaded[change].weights_alone):
            assert torch.equal(trained.module[name], master.to(dtype)), name
    if source.num_ranks == target.num_ranks and source.bf16 == target.bf16:
        assert got.losses == pytest.approx(want.losses, rel=1e-5)


def test_without_moments_the_second_loss_is_another(
    saved: dict[Layout, Trained], loaded: dict[tuple[Layout, Layout], Loaded]
) -> None:
    change = Layout(3, 1), Layout(3, 1)
    want, fresh = saved[change[0]].losses, loaded[change].weights_alone.losses
    assert loaded[change].whole.losses == want
    assert fresh[0] == want[0]
    assert abs(fresh[1] - want[1]) > 1e-3 * want[1]


@pytest.mark.parametrize("layout", [Layout(2, 1), Layout(3, 3)], ids=str)
def test_the_universal_form_is_that_of_deepspeed_s_converter(
    folder: Path, saved: dict[Layout, Trained], tmp_path: Path, layout: Layout
) -> None:
    source = open_deepspeed_checkpoint(path_of(folder, layout))
    write_universal_checkpoint(source, tmp_path / "ours")
    assert_equal(UniversalCheckpoint(tmp_path / "ours"), saved[layout].state)
    convert_by_deepspeed(source.path, tmp_path / "theirs" / TAG)
    ours, theirs = UniversalCheckpoint(tmp_path / "ours"), UniversalCheckpoint(tmp_path / "theirs" / TAG)
    assert ours.step == theirs.step == 2
    # From stages 1 and 2 theirs holds tied weights under each of their names, and frozen ones; from stage 3 neither.
    assert {*ours.names} - {FROZEN} <= {*theirs.names} <= {*ours.names, TIED}
    owners = {TIED: "embedding.weight"}
    for name, part, tensor in whole(theirs):
        assert torch.equal(tensor, ours.read(owners.get(name, name), part, 0, tensor.numel()).view(tensor.shape)), name


def convert_by_deepspeed(path: Path, target: Path) -> None:
    tool = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--num_extract_workers", "1"]
    paths = ["--input_folder", path, "--output_folder", target, "--num_merge_workers", "1"]
    subprocess.run([sys.executable, *tool, *paths], check=True, capture_output=True)


def test_a_universal_form_in_which_deepspeed_mixed_up_the_parameters_is_refused(
    folder: Path, saved: dict[Layout, Trained], tmp_path: Path
) -> None:
    convert_by_deepspeed(path_of(folder, Layout(2, 1, switch=ROUND_ROBIN)), tmp_path / TAG)
    with pytest.raises(WeightsError, match="round_robin_gradients, whose parameters it mixes up; convert that"):
        UniversalCheckpoint(tmp_path / TAG)
    convert_by_deepspeed(path_of(folder, Layout(2, 2, switch=ALIGNED)), tmp_path / "aligned")
    want = saved[Layout(2, 2, switch=ALIGNED)].state
    for name, part, tensor in whole(UniversalCheckpoint(tmp_path / "aligned")):
        assert name in (TIED, FROZEN) or torch.equal(tensor, want[name][part]), (name, part)


def test_deepspeed_s_own_script_reads_the_same(folder: Path, saved: dict[Layout, Trained]) -> None:
    for layout in (Layout(2, 1, switch=ROUND_ROBIN), Layout(2, 2, switch=ALIGNED)):
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder / str(layout)), TAG)
        ours = open_deepspeed_checkpoint(path_of(folder, layout))
        assert {*ours.names} - {FROZEN} <= {*theirs}
        assert [name for name in theirs if name != TIED and not torch.equal(ours.get(name), theirs[name])] == []


def test_what_does_not_fit_is_refused_before_anything_is_written(
    folder: Path, saved: dict[Layout, Trained], tmp_path: Path
) -> None:
    weights = {name: parts[WEIGHTS] for name, parts in saved[Layout(1, 0)].state.items()}
    surplus = weights | {"body.scale": torch.ones(3)}
    missing = {name: tensor for name, tensor in weights.items() if name != "norm.bias"}
    reshaped = weights | {"body.weight": torch.ones(7, 8)}
    for name, state in {"surplus": surplus, "missing": missing, "reshaped": reshaped, "whole": weights}.items():
        write_portable(InMemory(state), [], tmp_path / name)
    jobs = [(tmp_path / name, Layout(1, 2)) for name in ("surplus", "missing", "reshaped", "whole")]
    with RankPool() as pool:
        messages = pool.run(errors, jobs, num_ranks=1)[0]
    assert "body.scale is no parameter of the model" in messages[0]
    assert "norm.bias is missing" in messages[1]
    assert "body.weight is [7, 8] where the model has [7, 7]" in messages[2]
    assert "weights without optimizer states" in messages[3]


def test_a_missing_or_damaged_file_is_named(folder: Path, saved: dict[Layout, Trained], tmp_path: Path) -> None:
    for file in path_of(folder, Layout(3, 2)).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first, second, _ = sorted(tmp_path.glob("*optim_states.pt"))
    first.write_bytes(first.read_bytes()[:-500])
    with pytest.raises(WeightsError, match=f"{first.name} cannot be read"):
        open_state(tmp_path)
    first.write_bytes((path_of(folder, Layout(3, 2)) / first.name).read_bytes())
    second.unlink()
    with pytest.raises(WeightsError, match="written by 3 ranks and has the optimizer states of 2"):
        open_state(tmp_path)


class InMemory:
    """A WeightSource over tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.names = tuple(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def test_moments_are_of_every_trained_parameter(saved: dict[Layout, Trained]) -> None:
    """So that a comparison of states cannot pass for want of moments."""
    for trained in saved.values():
        for name, parts in trained.state.items():
            assert set(parts) == ({WEIGHTS} if name == FROZEN else {WEIGHTS, *MOMENTS})
            assert name == FROZEN or parts["exp_avg"].abs().max() > 0
