"""Hugging Face folders are read and written as transformers does it, bit for bit and one tensor at a time."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Size, Tensor
from transformers import PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from megatron.hf.export import Target, save_folder
from megatron.hf.weights import folder_source
from megatron.weights.errors import WeightsError
from megatron.weights.hugging_face import Settings
from megatron.weights.published_config import read_published_config
from megatron.weights.safetensors_folder import SafetensorsFolder, SafetensorsWriter
from tests.distributed.live_bytes import LiveBytesMeter
from tests.unit.hf.published_models import loaded, published, tiny_model
from tests.unit.hf.tiny_models import TINY

SMALL_SHARDS = 20_000
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
Change = Callable[[str, Tensor], Mapping[str, Tensor]]


def rewrite(folder: Path, out: Path, change: Change, **config: Any) -> Path:
    """Copy a folder; `change` returns what becomes of each tensor."""
    tensors = SafetensorsFolder(folder)
    with SafetensorsWriter(out) as writer:
        for name in tensors.names:
            for new_name, tensor in change(name, tensors.get(name)).items():
                writer.add(new_name, tensor)
        content = {**json.loads((folder / "config.json").read_text()), **config}
        (writer.staging / "config.json").write_text(json.dumps(content))
    return out


def assert_reads_as(folder: Path, model: PreTrainedModel) -> None:
    """Every parameter and saved buffer, and a run of elements from its middle, is what transformers loads."""
    source, want = folder_source(folder), model.state_dict()
    assert {name for name, _ in model.named_parameters()} <= set(source.names) <= set(want)
    for name in source.names:
        tensor = want[name]
        assert torch.equal(source.get(name).to(tensor.dtype), tensor), name
        start = tensor.numel() // 3
        run = source.read(name, "fp32", start, tensor.numel() - 2 * start)
        assert torch.equal(run.to(tensor.dtype), tensor.flatten()[start : tensor.numel() - start]), name
        assert source.read(name, "fp32", tensor.numel(), 0).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", TINY)
def test_a_folder_is_read_and_written_as_transformers_does(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = published(family, tmp_path / "theirs", dtype, max_shard_size="20KB")
    assert_reads_as(tmp_path / "theirs", model)
    target = Target(tmp_path / "ours", Settings(SMALL_SHARDS))
    source = folder_source(tmp_path / "theirs")
    assert save_folder(source, read_published_config(tmp_path / "theirs"), target) == type(model).__name__
    theirs, ours = SafetensorsFolder(tmp_path / "theirs"), SafetensorsFolder(tmp_path / "ours")
    assert ours.names == theirs.names
    for name in theirs.names:
        assert ours.dtype(name) == theirs.dtype(name)
        assert torch.equal(ours.get(name), theirs.get(name)), name
    again = loaded(tmp_path / "ours")
    assert type(again) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].dtype == tensor.dtype


def test_what_transformers_keeps_in_fp32_is_not_cast(tmp_path: Path) -> None:
    published("deepseek_v3", tmp_path / "fp32")
    target = Target(tmp_path / "bf16", Settings(dtype=torch.bfloat16), max_position_embeddings=4096)
    save_folder(folder_source(tmp_path / "fp32"), read_published_config(tmp_path / "fp32"), target)
    written = SafetensorsFolder(tmp_path / "bf16")
    kept = {name for name in written.names if written.dtype(name) == torch.float32}
    model = loaded(tmp_path / "bf16")
    assert kept == {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert any(name.endswith("gate.e_score_correction_bias") for name in kept)
    assert (model.config.dtype, model.config.max_position_embeddings) == (torch.bfloat16, 4096)


def test_tokenizer_and_generation_settings_are_copied(tmp_path: Path) -> None:
    published("llama", tmp_path / "a")
    for name in ("tokenizer.json", "chat_template.jinja", "other.txt"):
        (tmp_path / "a" / name).write_text("{}")
    target = Target(tmp_path / "b", beside=(tmp_path / "a",))
    save_folder(folder_source(tmp_path / "a"), read_published_config(tmp_path / "a"), target)
    names = {file.name for file in (tmp_path / "b").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"
    }  # fmt: skip


def test_a_context_that_does_not_fit_learned_positions_is_refused(tmp_path: Path) -> None:
    published("gpt2", tmp_path / "a")
    target = Target(tmp_path / "b", max_position_embeddings=4096)
    with pytest.raises(WeightsError, match=r"'transformer.wpe.weight' is \[256, 32\], and config.json asks for \[4096"):
        save_folder(folder_source(tmp_path / "a"), read_published_config(tmp_path / "a"), target)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def without_prefix(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor}


def with_head(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor, "lm_head.weight": tensor} if "embed_tokens" in name else {name: tensor}


def with_head_alone(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name.replace("model.embed_tokens", "lm_head"): tensor}


def with_old_buffers(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name.replace("q_proj.weight", "rotary_emb.inv_freq"): torch.ones(4), name: tensor}


@pytest.mark.parametrize(
    "family, change",
    [
        ("gpt2", without_prefix),
        ("llama-tied", with_head),
        ("llama-tied", with_head_alone),
        ("llama", with_old_buffers),
    ],
)
def test_names_of_other_versions_are_read_as_transformers_does(family: str, change: Change, tmp_path: Path) -> None:
    model = published(family, tmp_path / "a")
    assert_reads_as(rewrite(tmp_path / "a", tmp_path / "b", change), model)


def fp8_blocks(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Quantize in blocks of 8 x 8, as DeepSeek-V3 is published in blocks of 128 x 128."""
    if tensor.ndim != 2 or "proj" not in name:
        return {name: tensor}
    scales = torch.rand(-(-tensor.shape[0] // 8), tensor.shape[1] // 8, generator=torch.Generator().manual_seed(1))
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def mxfp4_blocks(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Replace experts with random blocks of 32 values and a scale, as gpt-oss is published."""
    if not re.search(r"experts\.(gate_up|down)_proj$", name):
        return {name: tensor}
    (num, rows, columns), generator = tensor.shape, torch.Generator().manual_seed(len(name))
    blocks = torch.randint(0, 256, (num, columns, rows // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (num, columns, rows // 32), dtype=torch.uint8, generator=generator)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8]}


def test_a_tensor_missing_beside_quantized_experts_is_the_one_that_is_named(tmp_path: Path) -> None:
    tiny_model("gpt_oss", torch.bfloat16).save_pretrained(tmp_path / "a")

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {} if name == "model.norm.weight" else mxfp4_blocks(name, tensor)

    folder = rewrite(tmp_path / "a", tmp_path / "b", change, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(WeightsError, match=r"config.json: 'model.norm.weight' is missing; copy"):
        folder_source(folder)


def test_mxfp4_is_dequantized_as_transformers_does(tmp_path: Path) -> None:
    tiny_model("gpt_oss", torch.bfloat16, intermediate_size=64).save_pretrained(tmp_path / "a")
    settings = {"quant_method": "mxfp4"}
    folder = rewrite(tmp_path / "a", tmp_path / "b", mxfp4_blocks, quantization_config=settings)
    assert_reads_as(folder, loaded(folder, quantization_config=Mxfp4Config(dequantize=True)))
    save_folder(folder_source(folder), read_published_config(folder), Target(tmp_path / "c"))
    assert_reads_as(folder, loaded(tmp_path / "c"))


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_fp8_blocks_are_multiplied_by_their_scales(family: str, tmp_path: Path) -> None:
    multiples_of_8 = {"q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
    tiny_model(family, torch.bfloat16, **multiples_of_8).save_pretrained(tmp_path / "a")

    def dequantized(name: str, tensor: Tensor) -> dict[str, Tensor]:
        blocks = fp8_blocks(name, tensor)
        if len(blocks) == 1:
            return blocks
        values, scales = blocks.values()
        return {name: (values.float() * scales.repeat_interleave(8, 0).repeat_interleave(8, 1)).bfloat16()}

    rewrite(tmp_path / "a", tmp_path / "want", dequantized)
    folder = rewrite(tmp_path / "a", tmp_path / "fp8", fp8_blocks, quantization_config=FP8)
    assert_reads_as(folder, loaded(tmp_path / "want"))


def unchanged(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor}


def lacking(lost: str) -> Change:
    return lambda name, tensor: {} if name == lost else {name: tensor}


def cut(short: str) -> Change:
    return lambda name, tensor: {name: tensor[1:]} if name == short else {name: tensor}


def with_stranger(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor, "model.vision.weight": tensor} if name == "model.norm.weight" else {name: tensor}


def with_another_head(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor, "lm_head.weight": tensor + 1} if "embed_tokens" in name else {name: tensor}


def in_integers(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor.to(torch.int8) if name == "model.norm.weight" else tensor}


def without_a_scale(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {new: value for new, value in fp8_blocks(name, tensor).items() if "o_proj.weight_scale" not in new}


@pytest.mark.parametrize(
    "family, change, config, message",
    [
        ("qwen3_moe", lacking("model.norm.weight"), {}, "'model.norm.weight' is missing"),
        ("qwen3_moe", lacking(EXPERT), {}, f"'{EXPERT}' is missing"),
        ("qwen3_moe", cut(EXPERT), {}, f"'{EXPERT}' is [23, 32], and config.json asks for [24, 32]"),
        (
            "qwen3_moe",
            unchanged,
            {"num_local_experts": 7},
            "'model.layers.0.mlp.experts.6.gate_proj.weight' is missing",
        ),
        ("qwen3_moe", unchanged, {"num_hidden_layers": 2}, "'model.layers.2.input_layernorm.weight' is no part of the"),
        ("llama", with_stranger, {}, "'model.vision.weight' is no part of the model"),
        ("llama-tied", with_another_head, {}, "ties 'model.embed_tokens.weight' and 'lm_head.weight'"),
        ("llama", in_integers, {}, "'model.norm.weight' in FOLDER holds int8"),
        ("llama", fp8_blocks, {}, "is no part of the model"),
        ("llama", without_a_scale, {"quantization_config": FP8}, "o_proj.weight' is quantized, and has no scales"),
        ("llama", unchanged, {"quantization_config": {"quant_method": "gptq"}}, "FOLDER are quantized (gptq)"),
        ("llama", unchanged, {"model_type": "nothing"}, "model_type 'nothing', which this transformers does not have"),
        ("llama", unchanged, {"hidden_size": "wide"}, "describes no llama"),
    ],
)
def test_a_folder_that_is_not_the_model_is_refused(
    family: str, change: Change, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    published(family, tmp_path / "a")
    folder = rewrite(tmp_path / "a", tmp_path / "b", change, **config)
    with pytest.raises(WeightsError, match=re.escape(message.replace("FOLDER", str(folder)))) as caught:
        folder_source(folder)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    published("qwen3_moe", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=f"{shard.name} is cut off"):
        folder_source(tmp_path)


def test_a_weight_of_another_model_is_not_written(tmp_path: Path) -> None:
    published("llama", tmp_path / "a")
    config = {**read_published_config(tmp_path / "a"), "num_hidden_layers": 2}
    with pytest.raises(WeightsError, match=r"not those of a LlamaForCausalLM .* 'model.layers.2.* is no part"):
        save_folder(folder_source(tmp_path / "a"), config, Target(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The name and the number of elements of every read from a folder."""
    reads: list[tuple[str, int]] = []
    read = SafetensorsFolder.read

    def counted(folder: SafetensorsFolder, name: str, start: int, count: int) -> Tensor:
        reads.append((name, count))
        return read(folder, name, start, count)

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    return reads


def test_a_part_of_a_stack_is_read_from_its_own_experts_alone(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    model = published("qwen3_moe", tmp_path)
    source = folder_source(tmp_path)
    assert reads == []  # headers alone
    name = "model.layers.0.mlp.experts.gate_up_proj"
    numel = model.get_parameter(name).numel()
    source.read(name, "fp32", numel // 2, numel // 2)
    wanted = {
        f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight" for expert in (3, 4, 5) for kind in ("gate", "up")
    }
    assert {name for name, _ in reads} == wanted
    reads.clear()
    source.read("model.embed_tokens.weight", "fp32", 32, 64)
    assert reads == [("model.embed_tokens.weight", 64)]


def test_reading_and_writing_hold_one_tensor_or_one_expert(tmp_path: Path) -> None:
    """A stack of 32 experts is read with one of them beside it, and written one by one."""
    settings: dict[str, Any] = {"num_experts": 32, "num_hidden_layers": 1}
    tiny_model("qwen3_moe", **settings).save_pretrained(tmp_path / "a")
    source = folder_source(tmp_path / "a")
    expert_bytes = 4 * 3 * 24 * 32  # gate, up, down
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    with LiveBytesMeter(in_host_tier=lambda tensor: tensor.is_meta) as meter:
        source.get(stack)
    assert meter.peak_bytes <= 4 * Size(source.shape(stack)).numel() + 2 * expert_bytes
    others = [4 * Size(source.shape(name)).numel() for name in source.names if "experts" not in name]
    with LiveBytesMeter(in_host_tier=lambda tensor: tensor.is_meta) as meter:
        save_folder(source, read_published_config(tmp_path / "a"), Target(tmp_path / "b"))
    assert meter.peak_bytes <= max(*others, 4 * expert_bytes)
