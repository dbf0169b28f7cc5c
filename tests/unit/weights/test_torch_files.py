"""DeepSpeed's files, read without DeepSpeed and without executing code from a pickle."""

import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.weights.errors import WeightsError
from megatron.weights.torch_files import MappedFiles, ZeroStage, loss_scale_state, read_torch_file


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_deepspeed_s_classes_are_read_as_stand_ins(tmp_path: Path) -> None:
    content = {"place": fragment_address(numel=5, start=2), "stage": ZeroStageEnum.weights}
    read = read_torch_file(save(tmp_path / "a.pt", content))
    assert (read["place"].start, read["place"].numel, int(read["stage"])) == (2, 5, 3)
    assert type(read["place"]).__module__ == "megatron.weights.torch_files"


class ByAttribute:
    """As Python 3.11.2 pickles a member of an enumeration."""

    def __init__(self, owner: object, name: str) -> None:
        self.reduced = getattr, (owner, name)

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return self.reduced


def test_a_stage_is_read_however_python_pickles_it(tmp_path: Path) -> None:
    read = read_torch_file(save(tmp_path / "a.pt", {"stage": ByAttribute(ZeroStageEnum, "gradients")}))
    assert (type(read["stage"]), int(read["stage"])) == (ZeroStage, 2)
    for other in (ByAttribute(ZeroStageEnum, "__subclasses__"), ByAttribute(torch.Tensor, "numpy")):
        with pytest.raises(WeightsError, match=r"a\.pt cannot be read"):
            read_torch_file(save(tmp_path / "a.pt", other))


def test_the_state_of_a_dynamic_loss_scale_is_carried(tmp_path: Path) -> None:
    scaler = DynamicLossScaler(2.0**16, 1000, 1, 2, False)
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 1024.0, 9, 7, 1
    state = loss_scale_state(read_torch_file(save(tmp_path / "a.pt", scaler)))
    assert state == {"cur_scale": 1024.0, "cur_iter": 9, "last_overflow_iter": 7, "cur_hysteresis": 1}


def test_a_static_loss_scale_is_left_to_its_flag(tmp_path: Path) -> None:
    assert loss_scale_state(read_torch_file(save(tmp_path / "a.pt", LossScaler(128.0)))) == {}
    assert loss_scale_state(None) == {}


class Executes:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def test_code_in_a_file_is_refused_and_not_executed(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a\.pt cannot be read"):
        read_torch_file(save(tmp_path / "a.pt", Executes()))
    with pytest.raises(SystemExit, match="executed"):
        pickle.loads(pickle.dumps(Executes()))


def test_files_are_released_once_enough_was_read(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{name}.pt", {"x": torch.ones(4)}) for name in "ab"]
    files = MappedFiles(max_bytes=100)
    first = [files.content(path, 40) for path in paths]
    assert files.content(paths[0], 20) is first[0]
    assert files.content(paths[0], 1) is not first[0]
    assert files.content(paths[0], 200) is not first[0]
