import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import (
    REPOSITORY,
    Column,
    Geometry,
    Report,
    Table,
    attempt,
    build_parser,
    git_commit,
    kernel_seconds,
    parse,
    run_script,
    spread,
    thousands,
    wall_seconds,
)
from megatron.config import ConfigError
from megatron.fpdt.host_pool import HostMemoryError

CPU = torch.device("cpu")
COLUMNS = (Column("name", "name"), Column("rate", "x matmul", ".3f"), Column("spread", "spread", ".1%"))
SCRIPTS = ["attention_tiles", "data_loader", "memory_over_length", "streamed_block", "training_step"]


def report_to(path, **others):
    arguments = SimpleNamespace(device="cpu", output=path, commit="abc1234", words=["--device", "cpu"], **others)
    return Report("attention_tiles", arguments, COLUMNS)


def test_table_lines_are_of_equal_width_and_formatted():
    table = Table(COLUMNS)
    line = table.line({"name": "ours", "rate": 0.51234, "spread": 0.021})
    assert len(line) == len(table.heading())
    assert line.split() == ["ours", "0.512", "2.1%"]


def test_table_says_what_is_not_known_and_what_failed():
    table = Table(COLUMNS)
    assert table.line({"name": "ours"}).split() == ["ours", "n/a", "n/a"]
    assert table.line({"name": "plain", "failed": "out of GPU memory"}).split() == [
        "plain",
        "out",
        "of",
        "GPU",
        "memory",
    ]


def test_spread_is_slowest_over_fastest_less_one():
    assert spread([2.0, 2.5, 2.2]) == pytest.approx(0.25)


@pytest.mark.parametrize("tokens, text", [(131072, "128K"), (2097152, "2M"), (1536, "1536"), (3 * 2**20, "3M")])
def test_token_counts_read_as_people_write_them(tokens, text):
    assert thousands(tokens) == text


def test_geometry_is_llama_3_8b_unless_told_otherwise():
    config = Geometry().model_config(4096, backend="reference")
    assert (config.hidden_size, config.ffn_hidden_size, config.kv_channels) == (4096, 14336, 128)
    assert (config.num_attention_heads, config.num_key_value_heads, config.seq_length) == (32, 8, 4096)
    assert config.swiglu
    assert config.attention_backend == "reference"


def test_clocks_run_the_work_as_often_as_asked():
    calls = []
    assert len(kernel_seconds(lambda: calls.append(1), CPU, repeats=3, warm_ups=2)) == 3
    assert len(calls) == 5
    assert wall_seconds(lambda: calls.append(1), CPU) > 0


@pytest.mark.parametrize(
    "error, text", [(torch.OutOfMemoryError(), "out of GPU memory"), (HostMemoryError(), "out of host memory")]
)
def test_memory_that_runs_out_is_a_row(error, text):
    def measure():
        raise error

    assert attempt(measure, CPU) == {"failed": text}


def test_flags_beat_the_defaults_of_quick_and_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def parsed(*words):
        parser = build_parser("name", "text")
        parser.add_argument("--tokens", type=int, default=100)
        return parse(parser, words, quick={"tokens": 10}, tiny={"tokens": 1}).tokens

    assert parsed() == 100
    assert parsed("--quick") == 10
    assert parsed("--quick", "--tokens", "7") == 7
    assert parsed("--device", "cpu") == 1
    assert parsed("--device", "cpu", "--tokens", "7") == 7


def test_without_a_gpu_a_script_exits_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        parse(build_parser("name", "text"), [], quick={}, tiny={})
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no GPU is visible to torch" in error


def test_an_error_that_the_user_can_fix_is_one_line(capsys):
    def main():
        raise ConfigError("--chunk (7) must be a multiple of 2; use 8")

    assert run_script(main) == 2
    assert capsys.readouterr().err == "error: --chunk (7) must be a multiple of 2; use 8\n"


def test_json_names_hardware_versions_commit_and_command_and_holds_every_row_at_once(tmp_path):
    report = report_to(tmp_path / "new folder" / "tiles", tiles=[64])
    report.add({"name": "ours", "rate": 0.5, "spread": 0.0})
    written = json.loads((tmp_path / "new folder" / "tiles.json").read_text())
    assert written["command"] == "python benchmarks/attention_tiles.py --device cpu"
    assert (written["commit"], written["torch"]) == ("abc1234", torch.__version__)
    assert written["device"].startswith("CPU")
    assert written["arguments"]["tiles"] == [64]
    assert written["matmul_tflops"] > 0
    assert written["rows"] == [{"name": "ours", "rate": 0.5, "spread": 0.0}]


def test_report_ends_with_the_yardstick_measured_again(tmp_path, capsys):
    report = report_to(tmp_path / "tiles")
    report.finish()
    assert json.loads((tmp_path / "tiles.json").read_text())["matmul_tflops_at_end"] > 0
    assert "at the end" in capsys.readouterr().out


def test_picture_is_a_png(tmp_path):
    with report_to(tmp_path / "tiles").picture(2) as axes:
        axes[1].plot([1, 2], [3, 4])
    assert (tmp_path / "tiles.png").read_bytes().startswith(b"\x89PNG")


def test_outside_git_the_commit_is_unknown(tmp_path):
    assert git_commit(tmp_path) == "unknown"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_explain_themselves_from_any_folder(name, tmp_path):
    result = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / f"{name}.py", "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"python benchmarks/{name}.py" in result.stdout
    assert "--device" in result.stdout
