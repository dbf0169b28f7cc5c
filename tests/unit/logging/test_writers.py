import errno
import os
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest

from megatron.config.errors import ConfigError
from megatron.config.logging import LoggingConfig
from megatron.logging.run_history import read_run
from megatron.logging.writers import TensorBoardWriter, WriterGroup, build_writer


class RecordingRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished = True


def test_tensorboard_stores_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = build_writer(LoggingConfig(tensorboard_dir=str(tmp_path)), rank=0)
    writer.write(3, {"lm loss": 2.5, "grad norm": 1.0})
    writer.write(4, {"lm loss": 2.25})
    writer.close()

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(3, 2.5), (4, 2.25)]
    assert [(event.step, event.value) for event in events.Scalars("grad norm")] == [(3, 1.0)]


def test_tensorboard_shows_an_iteration_that_is_repeated_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = build_writer(LoggingConfig(tensorboard_dir=str(tmp_path)), rank=0)
    for step in (1, 2, 3):
        writer.write(step, {"lm loss": float(step)})
    writer.discard_after(1)
    writer.write(2, {"lm loss": 20.0})
    writer.close()

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(1, 1.0), (2, 20.0)]


def test_a_disk_that_is_full_ends_the_metrics_with_one_warning_and_nothing_else(tmp_path, caplog):
    first, second = (build_writer(LoggingConfig(tensorboard_dir=str(tmp_path / name)), rank=0) for name in "ab")
    (broken,), (whole,) = first._writers, second._writers
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), broken._file.fileno())
    group = WriterGroup([broken, whole])
    for step in (1, 2, 3):
        group.write(step, {"lm loss": 1.0})
    group.close()
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoardWriter cannot store metrics: No space left on device; training continues without it, and the log "
        "has them all"
    ]
    assert read_run(tmp_path / "b").series["lm loss"] == {1: 1.0, 2: 1.0, 3: 1.0}


def test_a_full_disk_at_the_start_is_refused(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoardWriter, "_add", refuse)
    with pytest.raises(ConfigError, match=r"--tensorboard-dir \(.*\) cannot be written: No space left"):
        build_writer(LoggingConfig(tensorboard_dir=str(tmp_path)), rank=0)


def test_other_ranks_write_nothing(tmp_path):
    writer = build_writer(LoggingConfig(tensorboard_dir=str(tmp_path / "tb"), wandb_project="p"), rank=1)
    writer.write(1, {"lm loss": 1.0})
    writer.close()
    assert not (tmp_path / "tb").exists()


def test_asking_for_wandb_without_the_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"--wandb-project \(demo\) needs the package wandb.*pip install '\.\[wandb\]'"
    ):
        build_writer(LoggingConfig(wandb_project="demo"), rank=0)


def test_tensorboard_without_the_package_is_refused_with_the_flag_and_the_way_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = r"--tensorboard-dir \(.*/tb\) needs the package tensorboard, .*pip install '\.\[tensorboard\]'"
    with pytest.raises(ConfigError, match=words):
        build_writer(LoggingConfig(tensorboard_dir=str(tmp_path / "tb")), rank=0)
    assert not (tmp_path / "tb").exists()


def test_wandb_is_given_the_run_and_its_metrics(monkeypatch):
    run, started = RecordingRun(), {}
    spec = ModuleSpec("wandb", None)
    stand_in = SimpleNamespace(__spec__=spec, init=lambda **given: started.update(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    settings = LoggingConfig(wandb_project="demo", wandb_exp_name="first", wandb_save_dir="somewhere")
    writer = build_writer(settings, rank=0, run_config={"layers": 2})
    writer.write(7, {"lm loss": 2.0})
    writer.close()
    assert started == {"project": "demo", "name": "first", "dir": "somewhere", "config": {"layers": 2}}
    assert run.logged == [(7, {"lm loss": 2.0})]
    assert run.finished


def test_a_group_passes_everything_to_each_writer():
    class Recorder:
        def __init__(self):
            self.calls = []

        def write(self, step, metrics):
            self.calls.append((step, dict(metrics)))

        def discard_after(self, step):
            self.calls.append(step)

        def close(self):
            self.calls.append("closed")

    first, second = Recorder(), Recorder()
    group = WriterGroup([first, second])
    group.write(1, {"a": 2.0})
    group.discard_after(0)
    group.close()
    assert first.calls == second.calls == [(1, {"a": 2.0}), 0, "closed"]
