import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest

from megatron.config.errors import ConfigError
from megatron.config.logging import LoggingConfig
from megatron.logging.writers import WriterGroup, build_writer


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


def test_other_ranks_write_nothing(tmp_path):
    writer = build_writer(LoggingConfig(tensorboard_dir=str(tmp_path / "tb"), wandb_project="p"), rank=1)
    writer.write(1, {"lm loss": 1.0})
    writer.close()
    assert not (tmp_path / "tb").exists()


def test_asking_for_wandb_without_the_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--wandb-project \(demo\) needs the wandb package.*pip install wandb"):
        build_writer(LoggingConfig(wandb_project="demo"), rank=0)


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

        def close(self):
            self.calls.append("closed")

    first, second = Recorder(), Recorder()
    group = WriterGroup([first, second])
    group.write(1, {"a": 2.0})
    group.close()
    assert first.calls == second.calls == [(1, {"a": 2.0}), "closed"]
