"""DeepSpeed's files: reading executes no code, written files are flushed to disk, and an error is deferred."""

import os
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.engine.checkpoint_files import DurableWriter, SafeReader
from megatron.weights.errors import WeightsError
from tests.unit.weights.test_torch_files import ByAttribute


def test_every_file_is_flushed_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    writer = DurableWriter(zipfile_serialization=True)
    state = {"weight": torch.arange(5.0)}
    writer.save(state, str(tmp_path / "first.pt"))
    (tmp_path / "script.py").write_text("pass\n")
    writer.add(tmp_path / "script.py")
    assert writer.finish() == [tmp_path / "first.pt", tmp_path / "script.py"]
    assert flushed == [str(path) for path in writer.finish()]
    assert torch.equal(torch.load(tmp_path / "first.pt", weights_only=True)["weight"], state["weight"])


def test_the_first_error_is_recorded_and_nothing_is_written_after_it(tmp_path: Path) -> None:
    writer = DurableWriter(zipfile_serialization=True)
    writer.save({}, str(tmp_path / "absent" / "first.pt"))
    writer.save({}, str(tmp_path / "second.pt"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"absent/first\.pt"):
        writer.finish()


class Executes:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def test_the_classes_of_deepspeed_s_files_are_read_as_deepspeed_needs_them(tmp_path: Path) -> None:
    scaler = DynamicLossScaler(2.0**16, 1000, 1, 2, False)
    content = {"place": fragment_address(numel=5, start=2), "stages": list(ZeroStageEnum), "scaler": scaler}
    content |= {"fixed": LossScaler(8.0), "weight": torch.arange(3.0)}
    for zipfile_serialization in (True, False):
        writer = DurableWriter(zipfile_serialization)
        writer.save(content, str(tmp_path / "a.pt"))
        read = SafeReader(zipfile_serialization).load(str(tmp_path / "a.pt"), map_location="cpu")
        assert (read["place"], read["stages"]) == (content["place"], content["stages"])
        assert (type(read["scaler"]), vars(read["scaler"])) == (DynamicLossScaler, vars(scaler))
        assert (type(read["fixed"]), read["fixed"].cur_scale) == (LossScaler, 8.0)
        assert torch.equal(read["weight"], torch.arange(3.0))


@pytest.mark.parametrize("content", [Executes(), {"stage": ByAttribute(ZeroStageEnum, "__subclasses__")}])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt cannot be read \(.*(names exec, which|'__subclasses__' of)"):
        SafeReader(True).load(str(tmp_path / "a.pt"))


def test_a_stage_is_read_however_python_pickles_it(tmp_path: Path) -> None:
    torch.save(ByAttribute(ZeroStageEnum, "gradients"), tmp_path / "a.pt")
    assert SafeReader(True).load(str(tmp_path / "a.pt")) is ZeroStageEnum.gradients
