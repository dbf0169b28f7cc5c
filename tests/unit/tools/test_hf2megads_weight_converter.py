"""The converter as its user sees it: lines of progress, flags, one line per error, little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.arguments import parse_args
from megatron.config import architecture_fields
from megatron.weights.safetensors_folder import SafetensorsFolder, SafetensorsWriter
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import CASES, read_portable, save

TOOL = "hf2megads_weight_converter"
REQUIRED = ["--seq-length", "64", "--lr", "1e-4", "--train-iters", "1", "--data-path", "x", "--vocab-size", "61"]
TOKENIZER = {"tokenizer.json": "{}", "merges.txt": "a b", "generation_config.json": '{"eos_token_id": 7}'}


@pytest.mark.parametrize("name", CASES)
def test_both_directions_and_the_flags_between(tmp_path, capsys, name):
    save(name, tmp_path / "theirs")
    capsys.readouterr()
    assert run_tool(TOOL, "to-megatron", tmp_path / "theirs", tmp_path / "ours") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"shard 1 of {tmp_path / 'ours'}, from embedding.word_embeddings.weight on")
    flags = lines[-1].split()
    assert flags[:2] == ["--load", str(tmp_path / "ours")]
    config = parse_args([*flags, *REQUIRED, "--max-position-embeddings", "64"])
    portable, _ = read_portable(tmp_path / "ours")
    ignored = {"max_position_embeddings": 64}
    assert architecture_fields(config.model) | ignored == architecture_fields(portable.model) | ignored
    assert config.model.make_vocab_size_divisible_by == portable.padded_vocab_size

    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "back", "--max-shard-size", "9e3") == 0
    assert f"{tmp_path / 'back'} is written, a " in capsys.readouterr().out
    back, theirs = SafetensorsFolder(tmp_path / "back"), SafetensorsFolder(tmp_path / "theirs")
    assert back.names == theirs.names
    assert all(torch.equal(back.get(name), theirs.get(name)) for name in back.names)


def test_tokenizer_files_go_along_both_ways(tmp_path):
    save("llama", tmp_path / "theirs")
    for name, text in TOKENIZER.items():
        (tmp_path / "theirs" / name).write_text(text)
    assert run_tool(TOOL, "to-megatron", tmp_path / "theirs", tmp_path / "ours") == 0
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "back") == 0
    for folder in ("ours", "back"):
        assert {name: (tmp_path / folder / name).read_text() for name in TOKENIZER} == TOKENIZER


def test_a_training_config_next_to_the_weights_and_the_model_it_started_from(tmp_path):
    save("llama", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    assert run_tool(TOOL, "to-megatron", tmp_path / "theirs", tmp_path / "ours",
                    "--make-vocab-size-divisible-by", "64") == 0  # fmt: skip
    (tmp_path / "ours" / "tokenizer.json").unlink()
    portable, _ = read_portable(tmp_path / "ours")
    training = {"model": vars(portable.model) | {"seq_length": 256}, "training": {}}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(training))
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "back", "--like", tmp_path / "theirs") == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (61, 2)
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "padded") == 0
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["vocab_size"] == 64
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "cut", "--vocab-size", "61") == 0
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["vocab_size"] == 61


def test_a_model_from_scratch_has_the_token_ids_of_its_tokenizer_or_none(tmp_path, capsys):
    save("llama", tmp_path / "theirs", vocab_size=320)
    assert run_tool(TOOL, "to-megatron", tmp_path / "theirs", tmp_path / "ours") == 0
    portable, _ = read_portable(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps({"model": vars(portable.model)}))
    (tmp_path / "corpus.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 9)
    arguments = ("--vocab-size", "262", "--output-dir", tmp_path / "tokenizer")
    assert run_tool("train_tokenizer", "--input", tmp_path / "corpus.jsonl", *arguments) == 0
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "bare") == 0
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "named", "--tokenizer", tmp_path / "tokenizer") == 0
    for name, vocab_size, end in (("bare", 320, None), ("named", 262, 261)):
        config = AutoModelForCausalLM.from_pretrained(tmp_path / name).config
        assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (vocab_size, None, end)
    assert AutoTokenizer.from_pretrained(tmp_path / "named").eos_token_id == 261
    capsys.readouterr()
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "no", "--tokenizer", tmp_path / "theirs") == 2
    assert "is a folder without tokenizer.json" in capsys.readouterr().err


def test_another_family_takes_over_the_token_ids_and_nothing_else(tmp_path):
    theirs = save("llama", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text()) | {"llama_only": 1}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    assert run_tool(TOOL, "to-megatron", tmp_path / "theirs", tmp_path / "ours") == 0
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "same") == 0
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "other", "--model-type", "mistral") == 0
    same, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("same", "other"))
    assert (same["llama_only"], same["eos_token_id"], other["eos_token_id"]) == (1, 2, 2)
    assert "llama_only" not in other
    mistral = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(mistral(tokens).logits, theirs(tokens).logits)


def test_the_number_format_can_be_chosen(tmp_path):
    theirs = save("llama", tmp_path / "theirs")
    assert run_tool(TOOL, "to-megatron", tmp_path / "theirs", tmp_path / "ours", "--dtype", "bfloat16") == 0
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "back") == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == torch.bfloat16
    for name, parameter in theirs.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter.bfloat16())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["to-megatron", "{tmp}/absent", "{tmp}/out"], "config.json cannot be read"),
        (["to-megatron", "{tmp}/checkpoint", "{tmp}/out"], "is a checkpoint of a run of --hf-model"),
        (["to-hf", "{tmp}/absent", "{tmp}/out"], "is not there: no weights; name a checkpoint"),
        (["to-megatron", "{tmp}/theirs", "{tmp}/theirs"], "exists and is not an empty folder"),
        (["to-hf", "{tmp}/theirs", "{tmp}/out"], "no tensor 'embedding.word_embeddings.weight'; name portable weights"),
        (["to-hf", "{tmp}/ours", "{tmp}/out", "--model-type", "gpt2"], "no supported Hugging Face model_type"),
    ],
)
def test_an_error_is_one_line(tmp_path, capsys, arguments, message):
    save("llama", tmp_path / "theirs")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "hugging_face.json").touch()
    assert run_tool(TOOL, "to-megatron", tmp_path / "theirs", tmp_path / "ours") == 0
    capsys.readouterr()
    assert run_tool(TOOL, *(word.format(tmp=tmp_path) for word in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("flag", ["--max-shard-size", "--make-vocab-size-divisible-by"])
def test_sizes_below_one_are_refused(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        run_tool(TOOL, "to-megatron", tmp_path, tmp_path / "out", flag, "0")
    assert f"{flag} (0) must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, size, shown",
    [
        *(("--max-shard-size", size, f"{float(size):g}") for size in ("nan", "inf", "1e400")),
        *(("--make-vocab-size-divisible-by", str(size), str(size)) for size in (-1, 10**20, 10**400)),
    ],
)
def test_a_size_that_is_none_is_refused(tmp_path, capsys, flag, size, shown):
    with pytest.raises(SystemExit):
        run_tool(TOOL, "to-megatron", tmp_path, tmp_path / "out", flag, size)
    assert f"{flag} ({shown}) must be 1 or more" in capsys.readouterr().err


LARGE = {
    "model_type": "llama", "vocab_size": 4000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "max_position_embeddings": 2048,
}  # fmt: skip
MEASURED = """
import sys
from tests.unit.tools.tool import run_tool

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

tool, direction, small, small_out, large, large_out = sys.argv[1:]
assert run_tool(tool, direction, small, small_out) == 0  # what is imported on first use is not the model's
open("/proc/self/clear_refs", "w").write("5")  # begins a new peak
before = status("VmRSS")
assert run_tool(tool, direction, large, large_out) == 0
print(status("VmHWM") - before)
"""


def write_large_model(folder: Path) -> tuple[int, int]:
    """Write a LLaMA of some hundred MB in fp32; return (all bytes, bytes of its largest parameter here)."""
    hidden, width = LARGE["hidden_size"], LARGE["intermediate_size"]
    shapes = {
        "model.embed_tokens.weight": (4000, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (4000, hidden),
    }
    for number in range(LARGE["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (width, hidden) for part in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, width)
    with SafetensorsWriter(folder) as writer:
        (writer.staging / "config.json").write_text(json.dumps(LARGE))
        for name, shape in shapes.items():
            writer.add(name, torch.randn(shape))
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values()), 4 * 2 * width * hidden


def test_memory_is_a_few_tensors_and_not_the_model(tmp_path):
    num_bytes, largest = write_large_model(tmp_path / "theirs")
    assert num_bytes > 12 * largest
    save("llama", tmp_path / "small-theirs")
    for direction, source, out in (("to-megatron", "theirs", "ours"), ("to-hf", "ours", "back")):
        folders = [f"{tmp_path}/{size}{name}" for size in ("small-", "") for name in (source, out)]
        argv = [sys.executable, "-c", MEASURED, TOOL, direction, *folders]
        finished = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
        peak = int(finished.stdout.splitlines()[-1])
        assert peak < 4 * largest, f"{direction}: {peak / 2**20:.0f} MiB, largest {largest / 2**20:.0f} MiB"
    first, second = SafetensorsFolder(tmp_path / "theirs"), SafetensorsFolder(tmp_path / "back")
    assert first.names == second.names
    assert all(torch.equal(first.get(name), second.get(name)) for name in first.names)


@pytest.mark.parametrize("flags", [["--model-type", "llama"], ["--vocab-size", "61"]])
def test_flags_that_a_published_model_leaves_no_choice_of_are_refused(tmp_path, capsys, flags):
    (tmp_path / "global_step1").mkdir()
    for name in ("config.json", "hugging_face.json"):
        (tmp_path / "global_step1" / name).write_text("{}")
    assert run_tool(TOOL, "to-hf", tmp_path / "global_step1", tmp_path / "out", *flags) == 2
    assert f"{flags[0]} has no effect on a checkpoint of --hf-model" in capsys.readouterr().err


def test_a_context_length_is_for_a_published_model_alone(tmp_path, capsys):
    save("llama", tmp_path / "theirs")
    assert run_tool(TOOL, "to-megatron", tmp_path / "theirs", tmp_path / "ours") == 0
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "back", "--max-position-embeddings", "9") == 2
    assert "--max-position-embeddings is for checkpoints of --hf-model" in capsys.readouterr().err
