"""Settings of adapters: what peft's folder states, what flags may say, and the sizes that are planned."""

import json

import pytest
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron.arguments import parse_args
from megatron.config import AdaptersConfig, ConfigError, validate
from megatron.hf.adapter_settings import CONFIG_FILE, adapter_sizes, with_settings_of_folder
from megatron.hf.adapters import add_adapters
from megatron.hf.settings import with_hugging_face_model
from megatron.planner.flops import forward_flops, model_flops
from megatron.planner.hardware import GIB, GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.memory import memory_of
from tests.unit.hf.folders import LLAMA, folder_of
from tests.unit.hf.tiny_models import config_of

LLAMA_8B = {
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}


def written(folder, **changes):
    config = LoraConfig(r=8, lora_alpha=24, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], **changes)
    config.save_pretrained(folder)
    return AdaptersConfig(load_adapter=str(folder))


def test_a_folder_states_the_settings(tmp_path):
    settings = with_settings_of_folder(written(tmp_path, use_dora=True, target_parameters=["experts.down_proj"]))
    assert (settings.lora_rank, settings.alpha, settings.lora_dropout, settings.use_dora) == (8, 24.0, 0.1, True)
    assert settings.lora_target_modules == ("experts.down_proj", "q_proj", "v_proj")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_rslora": True}, r"use_rslora \(True\)"),
        ({"bias": "all"}, r"bias \(all\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights \(pissa\)"),
    ],
)
def test_settings_of_peft_that_are_not_supported_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        with_settings_of_folder(written(tmp_path, **changes))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        with_settings_of_folder(AdaptersConfig(load_adapter=str(tmp_path)))
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ConfigError, match="is of IA3"):
        with_settings_of_folder(AdaptersConfig(load_adapter=str(tmp_path)))


FLAGS = ["--seq-length", "128", "--lr", "1e-4", "--train-iters", "3", "--micro-batch-size", "1", "--bf16"]


def config_with(folder, *flags):
    return with_hugging_face_model(parse_args(["--hf-model", str(folder), *FLAGS, *flags]), 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora-dropout", "0.1"], "no effect without adapters"),
        (["--lora-rank", "4", "--merge-adapter"], "no effect without adapters and --save-hf"),
        (["--quantize-base", "nf4"], "no effect without adapters"),
        (["--lora-rank", "0"], "--lora-rank"),
        (["--lora-rank", "4", "--lora-target-modules", "nothing"], "names nothing in the layers"),
        (["--load-adapter", "ADAPTER", "--lora-rank", "4"], "no effect with --load-adapter"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, flags, message):
    written(tmp_path / "adapter")
    flags = [str(tmp_path / "adapter") if each == "ADAPTER" else each for each in flags]
    with pytest.raises(ConfigError, match=message):
        validate(config_with(folder_of(tmp_path / "model", LLAMA), *flags), 1, "cpu")


def test_adapters_are_for_hugging_face_models():
    native = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", *FLAGS, "--lora-rank", "4"]
    with pytest.raises(ConfigError, match=r"--lora-rank .* without --hf-model"):
        validate(parse_args(native), 1, "cpu")


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", AdaptersConfig(lora_rank=2)),
        ("gpt2", AdaptersConfig(lora_rank=4, use_dora=True)),
        ("qwen3_moe", AdaptersConfig(lora_rank=2, lora_target_modules=("q_proj", "experts.gate_up_proj"))),
    ],
)
def test_adapters_are_counted(family, settings):
    theirs = config_of(family)
    model = AutoModelForCausalLM.from_config(theirs)
    add_adapters(model, settings)
    sizes = adapter_sizes(theirs, settings)
    assert sizes.weights == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.block_weights == sizes.weights // 3
    stacks = [p.numel() for name, p in model.named_parameters() if name.endswith("layers.0.mlp.experts.gate_up_proj")]
    assert sizes.added_stacks == sum(stacks) or family == "qwen3_moe"


def test_lora_of_8b_at_256k_has_model_states_below_20_gib(tmp_path):
    CONFIG_MAPPING["llama"](**LLAMA_8B).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    flags = [*FLAGS, "--seq-length", str(2**18)]
    whole = with_hugging_face_model(parse_args(["--hf-model", str(tmp_path), *flags]), 1)
    lora = with_hugging_face_model(parse_args(["--hf-model", str(tmp_path), *flags, "--lora-rank", "16"]), 1)
    job, machines = Job.of(lora, 1, 128256), Machines(GPUS["H100"], 1, 1, 1900.0, None, None)
    assert job.num_parameters - job.trained_parameters == Job.of(whole, 1, 128256).num_parameters
    assert job.trained_parameters == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    memory = memory_of(job, machines, "flash-attn-4")
    assert 2 * job.num_parameters < memory.states < 2 * job.num_parameters + 13 * job.trained_parameters < 20 * GIB
    assert lora.notes[0].startswith("LoRA of rank 16: 41.9 million parameters are trained")
    nf4 = with_hugging_face_model(
        parse_args(["--hf-model", str(tmp_path), *flags, "--lora-rank", "16", "--quantize-base", "nf4"]), 1
    )
    in_blocks = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert memory.states - memory_of(Job.of(nf4, 1, 128256), machines, "flash-attn-4").states == in_blocks * 23 // 16
    assert nf4.notes[0].endswith("all others frozen, 6.98 billion of these in NF4, by bitsandbytes")
    forward = forward_flops(lora.model, 128256, 4096)
    once = 2 * (forward.token_wise + forward.head) + 3 * forward.attention
    assert model_flops(lora.model, 128256, 4096) == once + 2 * 4096 * job.trained_parameters
    assert model_flops(whole.model, 128256, 4096) == 3 * forward_flops(whole.model, 128256, 4096).total
