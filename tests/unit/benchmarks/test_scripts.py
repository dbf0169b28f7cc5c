"""Each script on made-up rows, and for real on a tiny case."""

import argparse
import json
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import (
    attention_tiles,
    data_loader,
    documents,
    generation,
    host_cost,
    hugging_face,
    memory_over_length,
    planner,
    run_flags,
    streamed_block,
    training_step,
)
from benchmarks.common import GIB, REPOSITORY, Geometry, Report, geometry_of
from megatron.arguments import parse_args
from megatron.config import validate
from megatron.core.parallel_state import ParallelState
from megatron.initialize import Context
from tests.distributed.launcher import launch
from tests.unit.hf.tiny_models import config_of


def report_of(script, tmp_path, rows, *words):
    arguments = script.parse_arguments(["--device", "cpu", "--output", str(tmp_path / "out"), *words])
    report = Report(script.NAME, arguments, script.COLUMNS)
    for row in rows:
        report.add(row)
    return report


def run(script, tmp_path, *words):
    code = script.main(["--device", "cpu", "--output", str(tmp_path / "out"), *words])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    return code, json.loads((tmp_path / "out.json").read_text())["rows"]


def test_a_profile_without_a_gpu_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        streamed_block.parse_arguments(["--device", "cpu", "--profile"])
    assert "--profile traces a GPU" in capsys.readouterr().err


# attention_tiles


def test_causal_tile_counts_as_half():
    assert attention_tiles.forward_flops(8192, 32, 128, causal=False) == 4 * 8192**2 * 32 * 128
    assert attention_tiles.forward_flops(8192, 32, 128, causal=True) == 2 * 8192**2 * 32 * 128


def test_rates_are_medians_over_both_phases():
    row = attention_tiles.rates(int(4e12), [1.0, 2.0, 9.0], [5.0, 5.0, 6.0], matmul=10.0)
    assert row["forward_tflops"] == pytest.approx(2.0)
    assert row["backward_tflops"] == pytest.approx(2.0)  # 2.5 x 4 / 5
    assert row["model_tflops"] == pytest.approx(12 / 7)
    assert row["times_matmul"] == pytest.approx(12 / 70)
    assert row["spread"] == pytest.approx(8.0)


def test_a_kernel_that_breaks_is_a_row(tmp_path):
    class Broken:
        name = "broken"

        def forward(self, *inputs):
            raise RuntimeError("no kernel for this shape\nand much more")

    report = report_of(attention_tiles, tmp_path, [])
    arguments = attention_tiles.parse_arguments(["--device", "cpu"])
    row = attention_tiles.measure_or_say_why(Broken(), 64, True, arguments, report)
    assert row == {"failed": "RuntimeError: no kernel for this shape"}


def test_tiles_run(tmp_path, capsys):
    code, rows = run(attention_tiles, tmp_path)
    assert code == 0
    assert {(row["backend"], row["tokens"], row["mask"]) for row in rows} == {
        ("torch-cpu", tile, mask) for tile in (64, 128) for mask in ("causal", "full")
    }
    assert "cudnn         " in capsys.readouterr().out  # and why it is not measured


# streamed_block


def test_blocks_are_compared_with_their_ceiling(tmp_path, capsys):
    code, rows = run(streamed_block, tmp_path, "--disk", f"{tmp_path},{tmp_path}", "--disk-share", "0.6")
    assert code == 0
    assert [row["way"] for row in rows] == ["ceiling", "offloaded", "disk", "on-device", "recomputed"]
    assert rows[2]["disk_written_gib"] > 0
    assert rows[2]["disk_read_gib"] > 0
    printed = capsys.readouterr().out
    assert re.search(r"GB/s read, .* written\n", printed)
    assert re.search(r"read per block, .* s without work for the GPU; \d+\.\d+ times the time of offloaded\n", printed)
    assert all("failed" not in row for row in rows)
    assert rows[0]["times_ceiling"] == pytest.approx(1.0)
    assert rows[1]["times_ceiling"] == pytest.approx(rows[1]["model_tflops"] / rows[0]["model_tflops"])


@pytest.mark.parametrize("words, lengths", [([], [262144]), (["--quick"], [131072]), (["--lengths", "65536"], [65536])])
def test_attention_layers_have_equal_heads_and_a_tiny_mlp(words, lengths, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = streamed_block.parse_arguments(["--attention-only", *words])
    assert arguments.ways == ["ceiling", "offloaded", "deepspeed"]
    assert arguments.lengths == lengths
    assert geometry_of(arguments) == Geometry(num_key_value_heads=32, ffn_hidden_size=128)


def test_cases_put_the_ceiling_first_and_name_the_kernel():
    arguments = streamed_block.parse_arguments(
        ["--ways", "recomputed", "offloaded", "ceiling", "--chunks", "16", "32", "--device", "cpu"]
    )
    rows = [row for row, _ in streamed_block.cases(arguments, torch.device("cpu"))]
    assert [(row["way"], row["chunk"]) for row in rows] == [
        ("ceiling", "-"), ("offloaded", "16"), ("offloaded", "32"), ("recomputed", "-"),
    ]  # fmt: skip
    assert {row["backend"] for row in rows} == {"torch-cpu"}


@pytest.mark.usefixtures("deterministic")
def test_deterministic_blocks_are_compared_with_a_deterministic_ceiling(tmp_path):
    words = ["--ways", "ceiling", "offloaded", "--deterministic-mode", "on", "off"]
    code, rows = run(streamed_block, tmp_path, *words)
    assert code == 0
    assert [row["deterministic"] for row in rows] == ["on", "on", "off", "off"]
    assert [row["times_ceiling"] for row in rows[::2]] == [1.0, 1.0]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ways", "deepspeed"], "--ways deepspeed is not there without --attention-only"),
        (["--attention-only", "--ways", "recomputed"], "--ways recomputed is not there with --attention-only"),
        (
            ["--attention-only", "--deterministic-mode", "on"],
            "--deterministic-mode on is not there for --ways deepspeed",
        ),
        (["--attention-only", "--lengths", "100"], "--deepspeed-chunk (96) must divide --lengths (100)"),
    ],
)
def test_ways_that_cannot_be_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        streamed_block.parse_arguments([*words, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_streamed_rows_are_compared_with_deepspeed():
    theirs = {"way": "deepspeed", "tokens": 8, "model_tflops": 200.0, "above_gib": 24.0}
    ours = {"way": "offloaded", "tokens": 8, "length": "8", "chunk": "4", "backend": "cudnn", "model_tflops": 500.0,
            "above_gib": 12.0}  # fmt: skip
    (line,) = streamed_block.against_deepspeed([ours, theirs])
    assert line == (
        "offloaded, 8 tokens, chunk 4, cudnn: 2.50 times DeepSpeed's model FLOP/s "
        "in 0.50 times its GPU memory above weights and gradients"
    )
    assert list(streamed_block.against_deepspeed([ours, theirs | {"failed": "out of GPU memory"}])) == []


def test_rows_that_failed_are_drawn(tmp_path):
    common = {"length": "8", "recompute": "all", "backend": "cudnn", "deterministic": "on"}
    row = {"way": "offloaded", "chunk": "4", "times_matmul": 0.6, "above_gib": 7.0, **common}
    failed = {"way": "recomputed", "chunk": "-", "failed": "out of GPU memory", **common}
    streamed_block.draw(report_of(streamed_block, tmp_path, [row, failed]))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# memory_over_length


def test_memory_runs_at_both_widths(tmp_path):
    code, rows = run(memory_over_length, tmp_path)
    assert code == 0
    assert [(row["width"], row["tokens"]) for row in rows] == [("full", 64), ("full", 128), ("narrow", 128)]
    short, long = (row["host_bytes_per_token"] for row in rows[:2])
    assert 0.8 * long < short < long  # keys and values of the last chunk are not stored, nor gradients of the last two


def test_growth_compares_the_longest_with_the_shortest(tmp_path):
    rows = [
        {"width": "full", "chunk": "32K", "tokens": tokens, "length": f"{tokens}", "above_gib": above,
         "host_used_gib": tokens / 8}
        for tokens, above in ((64, 2.0), (128, 2.1), (256, 2.2))
    ]  # fmt: skip
    rows.append({"width": "full", "chunk": "32K", "tokens": 512, "length": "512", "failed": "out of host memory"})
    (growth,) = memory_over_length.growths(rows)
    assert growth["ratio"] == pytest.approx(1.1)
    assert growth["text"] == "full block, chunk 32K: 4 times the tokens (64 to 256) take 1.100 times the GPU memory"
    memory_over_length.draw(report_of(memory_over_length, tmp_path, rows))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# data_loader


def test_the_loader_runs_with_and_without_blending(tmp_path):
    code, rows = run(data_loader, tmp_path, "--lengths", "256", "512", "--tokens", "4096", "--repeats", "2")
    assert code == 0
    assert [(row["sources"], row["tokens"], row["microbatches"]) for row in rows] == [
        (1, 256, 16), (1, 512, 8), (4, 256, 16), (4, 512, 8),
    ]  # fmt: skip
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["batch_mib"] == 28 * row["tokens"] / 2**20
        assert row["peak_mib"] >= row["batch_mib"]


def test_making_a_batch_takes_no_more_than_its_bytes_and_a_block(tmp_path):
    flags = "--documents --chunk-size 262144 --sequence-parallel-size 2 --tokens 4194304 --lengths 1048576 --repeats 1"
    arguments = data_loader.parse_arguments(flags.split())
    paths = data_loader.write_datasets(tmp_path, sources=2, num_tokens=2**22, vocab_size=128256)
    row = data_loader.measure(paths, 2**20, arguments)
    assert row["batch_mib"] == 14
    assert row["peak_mib"] - row["batch_mib"] < 4


def test_peak_bytes_counts_arrays_and_tensors_and_what_was_given_back():
    def work():
        torch.zeros(2**20, dtype=torch.uint8)
        tensor = torch.zeros(2**19, dtype=torch.uint8)
        return np.zeros(2**18, dtype=np.uint8), tensor

    assert data_loader.peak_bytes(work) == pytest.approx(2**20 + 2**18, rel=0.05)


@pytest.mark.parametrize("words, tokens", [([], 2**25), (["--quick"], 2**23), (["--tokens", "5000000"], 5_000_000)])
def test_the_loader_is_measured_on_a_cpu(words, tokens):
    arguments = data_loader.parse_arguments(words)
    assert (arguments.device, arguments.tokens) == ("cpu", tokens)


def test_fewer_tokens_than_two_samples_are_refused(capsys):
    with pytest.raises(SystemExit):
        data_loader.parse_arguments(["--tokens", "100"])
    assert "--tokens (100) must be at least twice the longest of --lengths" in capsys.readouterr().err


# training_step


@pytest.mark.parametrize("words", [[], ["--on-device", "--zero-stage", "0", "--deterministic-mode"]])
def test_training_flags_are_those_of_the_program(words):
    arguments = training_step.parse_arguments([*words, "--device", "cpu"])
    config = parse_args(training_step.training_flags(arguments))
    validate(config, 1, "cpu")
    assert config.model.kv_channels == 16
    assert config.parallel.ds_sequence_parallel_fpdt_offloading == (not words)
    assert config.deepspeed.zero_stage == (0 if words else 3)
    assert config.training.deterministic_mode == bool(words)
    assert not config.precision.bf16


@pytest.mark.parametrize("activations", run_flags.PLAIN)
def test_steps_without_fpdt_save_the_activations_asked_for(activations):
    arguments = training_step.parse_arguments(["--plain", activations, "--device", "cpu"])
    config = parse_args(training_step.training_flags(arguments))
    validate(config, 1, "cpu")
    assert not config.parallel.ds_sequence_parallel_fpdt
    assert config.deepspeed.deepspeed_activation_checkpointing == (activations != "kept")
    assert config.deepspeed.checkpoint_in_cpu == (activations == "on-host")


@pytest.mark.parametrize(
    "words, processes, message",
    [
        (["--steps", "0"], "1", r"--steps \(0\) must be at least 1"),
        (["--no-warm-up", "--short-warm-up"], "1", "contradict each other"),
        (["--as-one-of", "1"], "1", r"--as-one-of \(1\) plays 2 or more GPUs"),
        (["--as-one-of", "4"], "2", r"in a single process, not in 2; leave it out for one GPU, or the launcher"),
    ],
)
def test_steps_that_cannot_be_measured_are_refused(words, processes, message, monkeypatch, capsys):
    launcher = {"WORLD_SIZE": processes, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        training_step.parse_arguments([*words, "--device", "cpu"])
    assert re.search(message, capsys.readouterr().err)


def test_step_is_compared_with_its_blocks():
    step, block = {"model_flops": 60e12, "seconds": 10.0, "seq_length": 500}, {"model_tflops": 8.0, "seconds": 2.0}
    assert training_step.rates(step, num_gpus=2, matmul=12.0, peak=15.0) == {
        "tokens_per_second": pytest.approx(50.0),
        "tokens_per_second_per_gpu": pytest.approx(25.0),
        "model_tflops": pytest.approx(3.0),
        "times_matmul": pytest.approx(0.25),
        "mfu": pytest.approx(0.2),
    }
    step |= training_step.rates(step, num_gpus=1, matmul=12.0, peak=None)
    assert step["mfu"] is None
    assert training_step.against_block(step, block, num_layers=4) == {
        "times_block": pytest.approx(0.75),
        "outside_blocks_seconds": pytest.approx(2.0),
    }


def test_a_hugging_face_geometry_runs_as_the_native_one(tmp_path):
    pytest.importorskip("deepspeed")
    config_of("llama").save_pretrained(tmp_path)
    config = ["--device", "cpu", "--config", str(tmp_path), "--layers", "2", "--steps", "1"]
    script, rows = REPOSITORY / "benchmarks" / "hugging_face.py", []
    for way in ([], ["--native"]):
        words = [*config, *way, "--output", str(tmp_path / "out")]
        subprocess.run([sys.executable, script, *words], check=True, timeout=300)
        rows.append(json.loads((tmp_path / "out.json").read_text())["rows"])
    (_, step, _), (_, native_step, _) = rows
    assert step["model_flops"] == pytest.approx(native_step["model_flops"], rel=0.1)  # whose vocabulary is padded
    assert step["host_used_gib"] == pytest.approx(native_step["host_used_gib"])
    assert step["loss"] == pytest.approx(4.1, abs=0.3)  # random tokens of 61: ln 61


def test_adapters_run_on_random_weights_as_a_users_do(tmp_path):
    pytest.importorskip("bitsandbytes")
    config_of("qwen2").save_pretrained(tmp_path)
    words = ["--device", "cpu", "--output", str(tmp_path / "out"), "--config", str(tmp_path), "--lora-rank", "2",
             "--quantize-base", "nf4", "--chunk", "auto", "--zero-stage", "0", "--host-memory-limit", "8",
             "--step-only", "--steps", "1", "--no-warm-up"]  # fmt: skip
    script = REPOSITORY / "benchmarks" / "hugging_face.py"
    subprocess.run([sys.executable, script, *words], check=True, timeout=300)
    step, planned = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (step["what"], planned["what"]) == ("optimizer step", "as planned")
    assert step["loss"] == pytest.approx(4.1, abs=0.3)


def test_a_run_is_planned_for_a_smaller_machine_and_torch_allocates_no_more(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    device, log = torch.device("cuda", 0), logging.getLogger()
    context = Context(ParallelState(), device, torch.bfloat16, log, 100 * GIB, 79 * GIB)
    limits = argparse.Namespace(host_memory_limit=64.0, gpu_memory_limit=24.0)
    limited = training_step.with_limits(context, limits)
    assert (limited.host_memory_bytes, limited.device_memory_bytes) == (64 * GIB, 24 * GIB)
    assert fractions == [pytest.approx((24 - 1.5) / 80)]
    assert (
        training_step.with_limits(context, argparse.Namespace(host_memory_limit=None, gpu_memory_limit=None)) is context
    )


def test_a_block_of_a_hugging_face_model_has_each_kind_of_layer_and_no_dense_one():
    content = hugging_face.one_block(config_of("gpt_oss").to_dict())
    assert sorted(content["layer_types"]) == ["full_attention", "sliding_attention"]
    content = hugging_face.one_block(config_of("deepseek_v3").to_dict())
    assert (content["num_hidden_layers"], content["first_k_dense_replace"]) == (1, 0)


def test_steps_run_and_allocate_in_the_first_one_alone(tmp_path):
    pytest.importorskip("deepspeed")
    # In a process of its own: it takes the environment and the process group of a rank.
    script = REPOSITORY / "benchmarks" / "training_step.py"
    result = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--output", tmp_path / "out"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    block, step, planned = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (block["what"], step["what"], planned["what"]) == ("one block", "optimizer step", "as planned")
    # The planner plans half precision, and this ran in fp32.
    assert 2 * planned["host_used_gib"] == pytest.approx(step["host_used_gib"], rel=0.15)
    assert step["host_bytes_after_first_step"] == 0
    assert step["loss"] == pytest.approx(5.5, abs=0.3)  # random tokens of 256: ln 256
    shared = launch(script, ["--device", "cpu", "--output", str(tmp_path / "two")], 2)
    assert shared.succeeded, shared.describe()
    row, _ = json.loads((tmp_path / "two.json").read_text())["rows"]
    assert row["what"] == "on 2 GPUs"
    assert row["loss"] == pytest.approx(step["loss"], abs=1e-5)
    assert row["host_used_gib"] == pytest.approx(step["host_used_gib"] / 2, rel=0.1)
    among_twins = ["--as-one-of", "2", "--short-warm-up", "--steps", "1", "--output", str(tmp_path / "twins")]
    subprocess.run([sys.executable, script, "--device", "cpu", *among_twins], check=True, timeout=300)
    twin, _ = json.loads((tmp_path / "twins.json").read_text())["rows"]
    assert twin["what"] == "one of 2 GPUs"
    assert twin["host_used_gib"] == row["host_used_gib"]
    assert twin["received_gib"] > 0


# planner


def test_the_planner_is_held_to_its_limits():
    step = {"seconds": 10.0, "peak_gib": 20.0, "host_used_gib": 30.0, "process_gib": 40.0}
    planned = {"seconds": 10.9, "peak_gib": 17.0, "host_used_gib": 33.5, "process_gib": 40.0}
    row = {"case": "a"} | planner.compared(step, planned)
    assert planner.beyond_the_limits(row) == [
        "a: peak_gib is off by -15.0%, 10% is allowed",
        "a: host_used_gib is off by +11.7%, 10% is allowed",
    ]
    assert planner.beyond_the_limits({"case": "b", "failed": "exit code 1"}) == ["b: exit code 1"]


def test_what_a_cpu_does_not_measure_is_not_compared():
    step = {"seconds": 1.0, "peak_gib": None, "host_used_gib": 1.0, "process_gib": 1.0}
    row = planner.compared(step, dict.fromkeys(step, 1.0))
    assert "peak_gib_off" not in row
    assert planner.beyond_the_limits(row) == []


@pytest.mark.parametrize("case", planner.CASES)
def test_the_planners_cases_are_steps_that_can_be_run(case):
    training_step.parse_arguments(["--device", "cpu", "--step-only", *planner.CASES[case].split()])


def test_a_planned_case_runs_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("deepspeed")
    code, (row,) = run(planner, tmp_path)
    assert code == 1  # in fp32 on a CPU, which is not what is planned
    assert row["host_used_gib"] > 0
    assert (tmp_path / "out-tiny.json").exists()


# documents


@pytest.mark.parametrize("how", ["equal", "random"])
def test_documents_fill_the_sequence(how):
    spans = documents.cut(1000, 7, how).spans[0]
    assert len(spans) == 7
    assert [spans[0][0], *(end for _, end in spans)] == [*(start for start, _ in spans), 1000]
    assert all(start < end for start, end in spans)


def test_documents_end_to_end(tmp_path):
    code, (one, several) = run(documents, tmp_path, "--cut", "random")
    assert code == 0
    assert (one["documents"], one["attention_share"], one["faster"]) == (1, 1.0, 1.0)
    assert several["documents"] == 4
    assert several["attention_share"] < 1


# generation


def test_prompts_are_read_and_gone_on_from(tmp_path):
    code, rows = run(generation, tmp_path)
    assert code == 0
    assert [(row["way"], row["tokens"]) for row in rows] == [
        (way, length) for way in ("offloaded", "on-device") for length in (100, 200)
    ]
    # Keys and values of two heads of 16, fp32, two layers, for the prompt and the three tokens after it.
    first = rows[0]
    assert first["cache_gib"] * 2**30 == pytest.approx(103 * 2 * 2 * 16 * 4 * 2)
    assert first["gigabytes_per_second"] == pytest.approx(
        first["cache_gib"] * 2**30 / first["token_milliseconds"] / 1e6
    )


# host_cost


def test_the_host_launches_more_for_more_chunks_and_plain_execution_has_none(tmp_path):
    code, rows = run(host_cost, tmp_path)
    assert code == 0
    launches = {(row["way"], row["chunks"]): row["forward_launches"] + row["backward_launches"] for row in rows}
    assert launches["plain", 1] == launches["plain", 2]
    for way in ("on-device", "offloaded"):
        assert launches["plain", 1] < launches[way, 1] < launches[way, 2] < 2.5 * launches[way, 1]
    assert [row["tiles"] for row in rows if row["way"] != "plain"] == [1, 1, 3, 3]
    assert all(row["us_per_tile"] * row["tiles"] > row["backward_us"] > 0 for row in rows)


def test_views_and_allocations_are_no_launches():
    x = torch.ones(2, 3)
    with host_cost.Launches() as launches:
        torch.empty_like(x).copy_(x.view(3, 2).T.reshape(6)[:3])
    assert launches.number == 2  # the copy of the transposed tensor, and into the new one
