"""The comparison with DeepSpeed's ALST: flags, rows, table, and a run on two ranks."""

import json
import signal
import time

import pytest
import torch

from benchmarks import peers
from benchmarks.common import Table
from megatron.arguments import parse_args
from megatron.config import validate
from megatron.ops.attention import AttentionRequest, AttentionVariant, choose_backend

ROW = {"case": "fpdt", "seq_length": 65536, "length": "64K", "seconds": 2.0, "spread": 0.01, "peak_gib": 30.0,
       "tokens_per_second_per_gpu": 8192.0, "times_matmul": 0.6, "reserved_gib": 40.0, "process_gib": 50.0,
       "host_per_rank_gib": 60.0, "first_loss": 12.0, "first_gradient_norm": 3.0}  # fmt: skip
ALST = ROW | {"case": "alst", "tokens_per_second_per_gpu": 4096.0, "peak_gib": 60.0}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seq-lengths", "127"], r"--seq-lengths (127) must be multiples of --num-gpus (2); use 128"),
        (["--num-gpus", "3"], "--num-gpus (3) must divide --num-attention-heads (4)"),
        (["--num-gpus", "0"], "--num-gpus (0) must divide"),
        (["--steps", "0"], "--steps (0) must be at least 1"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        peers.parse_arguments([*words, "--device", "cpu"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("case", peers.CASES)
def test_a_rank_trains_the_model_that_was_asked_for(case):
    words = ["--device", "cpu", "--num-layers", "3", "--device-memory", "0.5", "--chunk", "64", "--steps", "4"]
    arguments = peers.parse_arguments(words)
    rank = peers.parse_arguments(peers.worker_words(case, 256, True, arguments))
    assert rank.worker == case
    step = peers.training_step.parse_arguments(peers.step_words(rank))
    assert (step.num_layers, step.seq_length, step.steps, step.short_warm_up) == (3, 256, 4, True)
    config = parse_args(peers.training_step.training_flags(step, 2))
    validate(config, 2, "cpu")
    assert config.parallel.ds_sequence_parallel_size == 2
    assert config.parallel.ds_sequence_parallel_fpdt == (case == "fpdt")
    if case == "fpdt":
        assert (step.chunk, step.device_memory) == (64, "0.5")


def test_the_table_has_a_line_per_row():
    table = Table(peers.COLUMNS)
    assert table.line(ROW).split() == ["fpdt", "64K", "2.000", "1.0%", "8192", "0.600", "30.0", "40.0", "50.0", "60.0",
                                       "12.00000", "3.0000"]  # fmt: skip
    failed = {"case": "alst", "length": "1M", "failed": "out of GPU memory"}
    assert table.line(failed).split() == ["alst", "1M", "out", "of", "GPU", "memory"]
    assert len(table.heading().split("  ")) >= len(peers.COLUMNS)


def test_fpdt_is_compared_with_each_peer_of_the_same_length():
    other = ALST | {"case": "plain", "seq_length": 131072}
    assert list(peers.comparisons([ALST, ROW, other])) == [
        "fpdt, 64K tokens: 2.00 x alst's tokens/s in 0.50 x its GPU memory"
    ]
    assert list(peers.comparisons([ALST | {"failed": "out of GPU memory"}, ROW])) == []


def test_the_longest_length_names_what_stopped_the_next():
    failed = {"case": "alst", "seq_length": 131072, "length": "128K", "failed": "out of GPU memory"}
    assert list(peers.longest([ALST, failed, ROW], ["alst", "fpdt", "plain"])) == [
        "alst: 64K fit; 128K: out of GPU memory",
        "fpdt: 64K fit; no failure",
        "plain: none fit; no failure",
    ]


@pytest.mark.parametrize("norm, num_lines", [(3.1, 0), (3.2, 1), (float("nan"), 1)])
def test_first_steps_must_agree(norm, num_lines):
    rows = [ROW, ALST | {"first_gradient_norm": norm}]
    assert len(peers.disagreements(rows, 2e-3, 5e-2)) == num_lines
    assert len(peers.disagreements([*rows, ROW | {"seq_length": 1, "first_loss": 1.0}], 2e-3, 5e-2)) == num_lines
    assert len(peers.disagreements([ROW, ALST | {"first_loss": 12.1}], 2e-3, 5e-2)) == 1


def test_memory_of_a_row_is_that_of_the_rank_with_the_most(tmp_path):
    for rank, peak in enumerate((1.0, 2.0)):
        row = {"seconds": 1.0 + rank, "peak_gib": None, "process_gib": peak}
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(row))
    assert peers.row_of_ranks([0, 0], tmp_path) == {"seconds": 1.0, "peak_gib": None, "process_gib": 2.0}


def test_a_rank_without_memory_explains_the_others(tmp_path):
    (tmp_path / "rank1.json").write_text(json.dumps({"failed": "out of GPU memory"}))
    assert peers.row_of_ranks([1, peers.OUT_OF_MEMORY], tmp_path) == {"failed": "out of GPU memory"}


def test_a_rank_that_broke_is_quoted(tmp_path):
    for rank in range(2):
        (tmp_path / f"rank{rank}.log").write_text("much\nerror: the reason\n")
    row = peers.row_of_ranks([None, 2], tmp_path)
    assert row["failed"].startswith("rank 1: exit code 2: error: the reason (")
    assert "perhaps for host memory" in peers.row_of_ranks([-signal.SIGKILL, None], tmp_path)["failed"]


@pytest.mark.parametrize(
    "error, reason",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory"),
        (RuntimeError("CUDA error: out of memory"), "out of memory (GPU or pinned)"),
        (peers.HostMemoryError("no room"), "out of host memory"),
        (RuntimeError("shapes differ"), None),
    ],
)
def test_running_out_of_memory_is_distinguished_from_other_errors(error, reason):
    assert peers.reason_of(error) == reason


def test_doubling_ends_with_the_first_failure(monkeypatch):
    def measure_case(case, length, short_warm_up, *_):
        row = {"case": case, "seq_length": length, "short": short_warm_up}
        return row | {"failed": "out of GPU memory"} if length > {"alst": 256, "fpdt": 512}[case] else row

    monkeypatch.setattr(peers, "measure_case", measure_case)
    arguments = peers.parse_arguments(["--device", "cpu", "--cases", "alst", "fpdt", "--find-longest"])
    rows = list(peers.measure_all(arguments, 1.0, float("inf")))
    assert [(row["case"], row["seq_length"], row["short"]) for row in rows] == [
        ("alst", 128, False), ("fpdt", 128, False),
        ("alst", 256, True), ("alst", 512, True),
        ("fpdt", 256, True), ("fpdt", 512, True), ("fpdt", 1024, True),
    ]  # fmt: skip


def test_a_row_that_is_late_is_ended(tmp_path):
    arguments = peers.parse_arguments(["--device", "cpu", "--output", str(tmp_path / "out")])
    row = peers.measure_case("plain", 128, False, arguments, 1.0, time.monotonic() + 0.5)
    assert row["failed"] == "ended by --time-limit"
    row = peers.measure_case("plain", 128, False, arguments, 1.0, time.monotonic())
    assert row["failed"] == "not started: --time-limit"


def test_hugging_face_models_can_call_our_kernel():
    pytest.importorskip("deepspeed")
    pytest.importorskip("transformers")
    from benchmarks.alst import KernelAttention

    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (
        torch.randn(2, heads, 40, 16, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)
    )  # fmt: skip
    inputs = [t.requires_grad_() for t in (q, k, v)]
    backend = choose_backend("auto", AttentionRequest(q.device, q.dtype, 16, (AttentionVariant(0.25),)))
    o = KernelAttention.apply(*inputs, backend, 0.25)
    gradients = torch.autograd.grad(o, inputs, do.transpose(1, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(o, expected.transpose(1, 2))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, do))


@pytest.mark.slow
def test_all_cases_train_the_same_model(tmp_path):
    pytest.importorskip("deepspeed")
    pytest.importorskip("transformers")
    words = ["--device", "cpu", "--seq-lengths", "512", "--chunk", "128", "--output", str(tmp_path / "out"),
             "--loss-tolerance", "1e-6", "--norm-tolerance", "1e-6", "--steps", "2"]  # fmt: skip
    assert peers.main(words) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["case"] for row in rows] == list(peers.CASES)
    assert all("failed" not in row for row in rows)
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 3, rel=1e-6)  # after two updates
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
