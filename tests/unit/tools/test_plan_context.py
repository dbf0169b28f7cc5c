import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from megatron.arguments import parse_args
from megatron.config.settings_file import settings_text
from tests.unit.tools.tool import TOOLS, load_tool

plan_context = load_tool("plan_context")

FOUR_H100 = ["--gpus", "4", "--gpu", "H100", "--host-memory", "1000"]
FLAGS = [
    *["--num-layers", "32", "--hidden-size", "4096", "--num-attention-heads", "32", "--seq-length", "262144", "--bf16"],
    *["--ds-sequence-parallel-size", "4", "--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-fpdt-offloading"],
    *["--zero-stage", "3", "--lr", "1e-4", "--train-iters", "10", "--data-path", "corpus"],
    *["--tokenizer-type", "NullTokenizer", "--vocab-size", "50000"],
]


def test_a_model_that_fits(capsys, tmp_path):
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    argv = ["--model", "llama-8b", *FOUR_H100, "--json", str(figures), "--plot", str(picture)]
    assert plan_context.main(argv) == 0
    text = capsys.readouterr().out
    assert "8.03B parameters on 4 H100, 262,144 tokens" in text
    assert "it fits; flags: --seq-length 262144 --ds-sequence-parallel-size 4" in text
    content = json.loads(figures.read_text())
    assert content["chunk_length"] == content["fastest_chunk"]
    assert content["fits_gpu"]
    assert content["fits_host"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_that_does_not_fit_ends_with_what_would(capsys):
    argv = ["--model", "Llama-3.1-8B", *FOUR_H100, "--seq-length", "64M", "--train-tokens", "1B"]
    assert plan_context.main(argv) == 1
    text = capsys.readouterr().out
    assert re.search(
        r"it does not fit the host:\n  - (\d+) GPUs on \d+ machines: .*-parallel-size \1 .* fits, with \d+\.\d s", text
    )
    assert re.search(
        r"\n  - \d+ GiB of host memory per machine, with .*\n  - --seq-length .* is the longest that fits\n", text
    )
    assert re.search(
        r"longest context: \d,\d{3},\d{3} tokens with --seq-length \d+ .* --ds-sequence-parallel-fpdt-r", text
    )
    assert re.search(r"\n  with --lora-rank 16: \d+,\d{3},\d{3} tokens with --lora-rank 16 --seq-length", text)
    assert re.search(r"training +[0-9.]+ days +1,000,000,000 tokens in 15 steps; started now, it ends on 20", text)


def test_heads_that_the_gpus_do_not_divide_are_reported(capsys):
    plan_context.main(["--model", "gpt-30b", "--gpus", "16"])
    shared = "56 heads over 16 ranks: 4 on 8 ranks, 3 on 8; 12.5% of attention's time is lost"
    assert f"\n  attention        {shared}\n" in capsys.readouterr().out


def test_flags_of_the_training_program_are_planned_as_they_are(capsys, tmp_path):
    figures = tmp_path / "plan.json"
    kernel = ["--use-flash-attn-v2", "--ds-sequence-parallel-fpdt-recompute", "mlp"]
    assert plan_context.main([*FOUR_H100, "--json", str(figures), "--", *FLAGS, *kernel]) == 0
    content = json.loads(figures.read_text())
    assert (content["attention_backend"], content["recompute"]) == ("torch-flash", "mlp")
    assert (content["chunk_length"], content["zero_stage"]) == (32768, 3)


def test_a_schedule_of_lengths_takes_the_time_of_its_phases_and_the_memory_of_the_largest(capsys, tmp_path):
    def planned(*flags):
        chunk = ["--ds-sequence-parallel-fpdt-chunk-size", "64K"]
        assert plan_context.main([*FOUR_H100, "--json", str(tmp_path / "plan.json"), "--", *FLAGS, *chunk, *flags]) == 0
        return json.loads((tmp_path / "plan.json").read_text())

    short, long = planned("--seq-length", "64K"), planned()
    capsys.readouterr()
    both = planned("--seq-length-schedule", "64K:7,256K")
    steps = [(phase["seq_length"], phase["steps"], phase["tokens"]) for phase in both["training_phases"]]
    assert steps == [(65536, 7, 7 * 65536), (262144, 3, 3 * 262144)]
    assert both["training_tokens"] == 7 * 65536 + 3 * 262144
    assert both["training_seconds"] == pytest.approx(7 * short["step_seconds"] + 3 * long["step_seconds"])
    for memory in ("gpu_gib_with_overhead", "host_gib"):
        assert both[f"training_{memory}"] == max(short[memory], long[memory])
    text = capsys.readouterr().out
    assert "1,245,184 tokens in 10 steps; started now, it ends on 20" in text
    assert re.search(r"\n    at 65,536 +\d+\.\d s +458,752 tokens in 7 steps of \d+\.\d s; ", text)
    assert re.search(r"\n    at most +\d+\.\d GiB of GPU memory, \d+\.\d of host memory per GPU\n", text)


def test_what_a_plan_does_not_depend_on_need_not_be_given(capsys, tmp_path):
    def planned():
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  training ")]

    assert plan_context.main([*FOUR_H100, "--", *FLAGS]) == 0
    with_all = planned()
    irrelevant = ["--lr", "1e-4", "--train-iters", "10", "--data-path", "corpus"]
    start = FLAGS.index(irrelevant[0])
    shorter = [*FLAGS[:start], *FLAGS[start + len(irrelevant) :]]
    file = tmp_path / "run.yaml"
    file.write_text(settings_text(parse_args([*FLAGS, "--train-tokens", "1e9"])))
    for flags in (shorter, [*shorter, "--train-samples=7", "--train-data-path", "corpus"], ["--config", str(file)]):
        assert plan_context.main([*FOUR_H100, "--", *flags]) == 0
        assert planned() == with_all


@pytest.mark.parametrize(
    "gpu, named",
    [
        (["--gpu", "geforce rtx 4090"], "on 1 RTX-4090 (rates estimated):"),
        (["--gpu-memory", "24", "--gpu-tflops", "165"], "on 1 GPU of 24 GiB and 165 TFLOP/s (rates estimated):"),
        (["--gpu", "h200"], "on 1 H200:"),
    ],
)
def test_a_gpu_is_named_or_described(capsys, gpu, named):
    argv = ["--model", "meta-llama/Llama-3.2-1B-Instruct", "--seq-length", "16,384", "--cpu-optimizer", *gpu]
    assert plan_context.main(argv) == 0
    text = capsys.readouterr().out
    assert text.startswith("1.24B parameters on 1")
    assert f"execution {named}" in text


@pytest.mark.parametrize("named", ["config.json", "."])
def test_a_model_of_hugging_face_is_read(capsys, tmp_path, named):
    LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert plan_context.main(["--model", str(tmp_path / named), *FOUR_H100]) == 0
    from_file = [line for line in capsys.readouterr().out.splitlines() if "--lora-rank" not in line]
    assert plan_context.main(["--model", "llama-8b", *FOUR_H100]) == 0
    assert capsys.readouterr().out.splitlines() == from_file


@pytest.mark.parametrize(
    "config", [each(vocab_size=1024, num_hidden_layers=2) for each in (GPT2Config, GPTNeoXConfig, Qwen2Config)]
)
def test_a_model_of_any_family_has_its_parameters(tmp_path, config):
    config.save_pretrained(tmp_path)
    figures = tmp_path / "plan.json"
    length = str(config.max_position_embeddings)
    assert plan_context.main(["--model", str(tmp_path), "--seq-length", length, "--json", str(figures)]) == 0
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert json.loads(figures.read_text())["parameters"] == pytest.approx(theirs.num_parameters(), rel=0.002)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "llama-8b", "--gpus", "4", "--sequence-parallel", "3"], "use one of 1, 2, 4"),
        (["--model", "llama-8b", "--link", "40", "30"], "--link takes one rate or three, not 2"),
        (["--model", "nothing"], "is neither a folder, nor a file, nor one of gpt-1.3b"),
        (["--model", "llama-8b", "--gpu", "MI300X"], "--gpu (MI300X) is AMD's, and copies, pinned memory and kernels"),
        (["--model", "llama-8b", "--gpu", "A100"], "names several GPUs; use one of A100-80GB, A100-40GB"),
        (["--model", "llama-8b", "--gpu-tflops", "100"], "give --gpu-memory"),
        (["--model", "llama-8b", "--lora-rank", "8"], "is for Hugging Face models"),
        (["--model", "llama-8b", "--backend", "cudnn", "--gpu", "A100-80GB"], "use one of torch-flash"),
        (["--gpus", "4", "--", "--num-layers", "2"], "--hidden-size"),
        (["--model", "llama-8b", "--gpus", "4", "--chunk-size", "1001"], "use 1000 or 1004"),
        (["--model", "llama-8b", "--gpus", "4", "--seq-length", "262145"], "use 262144 or 262148"),
        (["--gpus", "3", "--", *FLAGS], "--ds-sequence-parallel-size (4)"),
        (["--", *(flag for flag in FLAGS if flag != "--ds-sequence-parallel-fpdt-offloading")], "-fpdt-offloading"),
        (["--model", "llama-8b", "--disk", "5", "3"], "--disk (5 3) has no effect without --disk-memory; add it"),
        (["--gpus", "4", "--", *FLAGS, "--ds-sequence-parallel-fpdt-disk", "/nvme"], "add --disk-memory before --"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(argv, words, capsys):
    assert plan_context.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("content, words", [
    ({"model_type": "t5"}, "model_type 't5', which is no causal language model"), ({}, "has no model_type"),
])  # fmt: skip
def test_a_config_of_another_architecture_is_refused(capsys, tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    assert plan_context.main(["--model", str(path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "llama-8b", "--gpus", "0"], "--gpus: '0' is not a whole number from 1 to 2147483647"),
        (["--model", "llama-8b", "--", *FLAGS], "--model before -- would be overruled"),
        (["--model", "llama-8b", "--seq-length", "4G"], "'4G' is not a number of tokens"),
        (["--model", "llama-8b", "--train-tokens", "many"], "'many' is not a number of tokens"),
        (["--zero-stage=1", "--seq-length", "8192", "--", *FLAGS], "--seq-length, --zero-stage before --"),
    ],
)
def test_a_setting_that_would_not_count_is_refused(argv, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        plan_context.main(argv)
    assert words in capsys.readouterr().err


def test_the_link_is_the_gpu_s_or_the_one_given(tmp_path):
    figures = tmp_path / "plan.json"
    four = [*FOUR_H100, "--model", "llama-8b", "--seq-length", "65536", "--chunk-size", "65536"]
    four += ["--device-memory", "0"]

    def waiting(*link):
        plan_context.main([*four, "--json", str(figures), *link])
        return json.loads(figures.read_text())["waiting_seconds"]

    assert waiting("--link", "43", "43", "41") == waiting()
    assert waiting() < waiting("--link", "20") < waiting("--link", "20", "20", "10")


def test_the_folder_of_the_figures_is_made(tmp_path):
    figures = tmp_path / "new" / "plan.json"
    assert plan_context.main(["--model", "llama-8b", *FOUR_H100, "--json", str(figures)]) == 0
    assert figures.is_file()


def test_the_host_memory_of_this_machine_is_taken_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(plan_context, "available_host_bytes", lambda: 7 * 2**30)
    assert plan_context.main(["--model", "llama-8b", "--gpus", "4", "--gpu", "H100", "--host-memory", "here"]) == 1
    assert "GiB         of 1.7; " in capsys.readouterr().out


def test_nothing_to_plan_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        plan_context.main(["--gpus", "4"])
    assert "--model is missing" in capsys.readouterr().err


def test_the_published_table_is_the_one_in_the_docs(capsys):
    assert plan_context.main(["--published"]) == 0
    table = capsys.readouterr().out
    assert table in (TOOLS.parent / "docs" / "planner.md").read_text()


def test_the_vocabulary_is_the_tokenizer_s_or_one_that_is_said_to_be_assumed(capsys, tmp_path):
    flags, figures = FLAGS[: FLAGS.index("--tokenizer-type")], tmp_path / "plan.json"

    def parameters(*tokenizer):
        assert plan_context.main([*FOUR_H100, "--json", str(figures), "--", *flags, *tokenizer]) == 0
        return json.loads(figures.read_text())["parameters"], capsys.readouterr().err

    own, nothing = parameters("--tokenizer-type", "NullTokenizer", "--vocab-size", "100000")
    assumed, said = parameters("--tokenizer-type", "HFTokenizer", "--tokenizer-model", "absent")
    assert nothing == ""
    assert "a vocabulary of 50304 tokens is assumed" in said
    assert "--tokenizer-model (absent) does not exist" in said
    assert own - assumed == 4096 * (100_096 - 50_304)
