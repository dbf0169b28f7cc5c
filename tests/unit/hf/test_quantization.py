"""QLoRA: adapters on weights in NF4 train as on the dequantized weights, in transformers and in peft's own QLoRA."""

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from megatron.config import AdaptersConfig, ConfigError
from megatron.core.parallel_state import ParallelState
from megatron.hf.adapters import ADAPTER, add_adapters, is_of_adapter, lora_config, name_in_base
from megatron.hf.building import build_hugging_face_model
from megatron.hf.float64 import float64_stays
from megatron.hf.inspection import decoder_layers
from megatron.hf.nf4 import dequantize, quantize, stored_bytes
from megatron.hf.quantization import QuantizedSource, check_quantization, quantize_base, weights_to_quantize
from megatron.hf.weights import folder_source
from tests.unit.hf.test_adapters import DORA, EXECUTIONS, EXPERTS, LORA, adapted, results
from tests.unit.hf.tiny_models import build, eager_loss, inputs, worst_error

bitsandbytes = pytest.importorskip("bitsandbytes")

CASES = {
    "llama": ("llama", LORA),
    "llama-tied-dora": ("llama-tied", DORA),
    "llama-some": ("llama", AdaptersConfig(lora_rank=4, lora_target_modules=("v_proj", "down_proj"))),
    "gpt2": ("gpt2", LORA),
    "gpt2-dora": ("gpt2", DORA),
    "qwen3_moe": ("qwen3_moe", LORA),
    "gpt_oss": ("gpt_oss", LORA),
    "deepseek_v3": ("deepseek_v3", LORA),
}


def weights_of(model):
    return [(module, name, module.get_parameter(name)) for module, name in weights_to_quantize(decoder_layers(model))]


@torch.no_grad()
def rounded(model):
    """Put the weights that NF4 has in place of those that it rounds."""
    for _, _, weight in weights_of(model):
        weight.copy_(dequantize(quantize(weight), weight.shape, weight.dtype))
    return model


@torch.no_grad()
def quantized(model):
    weights = [(module, name, quantize(weight)) for module, name, weight in weights_of(model)]
    quantize_base(model)
    for module, name, stored in weights:
        getattr(module, name).quantized.copy_(stored)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 48), (7, 9), (3, 5, 10)])
def test_nf4_is_that_of_bitsandbytes(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    stored = quantize(weight)
    assert len(stored) == stored_bytes(weight.numel())
    functional = bitsandbytes.functional
    want = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(dequantize(stored, weight.shape, dtype), want)
    assert not torch.equal(want, weight)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_adapters_are_those_on_dequantized_weights(case):
    model = rounded(adapted(*CASES[case]))
    narrow = [quantized(adapted(*CASES[case])) for _ in EXECUTIONS]
    with float64_stays():
        want = results(model, eager_loss(model, *inputs()))
        for (name, execution), ours in zip(EXECUTIONS.items(), narrow, strict=True):
            streamed = build_hugging_face_model(ours, ParallelState(), execution)
            assert sum(p.dtype == torch.uint8 for p in streamed.parameters()) == len(weights_of(model))
            error, where = worst_error(results(streamed, streamed(*inputs())), want)
            assert error < 1e-10, (name, where)


def test_no_dequantized_weight_is_saved_for_backward():
    model = quantized(adapted("qwen3_moe", LORA))
    shapes = {weight.shape for _, _, weight in weights_of(adapted("qwen3_moe", LORA))}
    streamed = build_hugging_face_model(model, ParallelState(), EXECUTIONS["plain"])
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor):
        loss = streamed(*inputs())
    loss.backward()
    assert saved
    assert not shapes & {*saved, *(shape[::-1] for shape in saved if len(shape) == 2)}


def test_training_is_that_of_pefts_own_qlora():
    settings = AdaptersConfig(lora_rank=2)
    torch.manual_seed(0)
    theirs = build("llama", torch.float32)
    for module in decoder_layers(theirs).modules():
        for name, linear in module.named_children():
            if type(linear) is nn.Linear:
                narrow = bitsandbytes.nn.Linear4bit(
                    *(linear.in_features, linear.out_features, False, torch.float32, False, "nf4")
                )
                narrow.load_state_dict(linear.state_dict())
                setattr(module, name, narrow.to("cpu"))  # which quantizes
    inject_adapter_in_model(lora_config(theirs, settings), theirs, ADAPTER)
    ours = build("llama", torch.float32)
    add_adapters(ours, settings)
    generator = torch.Generator().manual_seed(7)
    trained = {
        name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in ours.named_parameters() if p.requires_grad
    }
    quantized(ours)
    for model in (theirs, ours):
        model.load_state_dict(trained, strict=False)
    want = results(theirs, eager_loss(theirs, *inputs()))
    streamed = build_hugging_face_model(ours, ParallelState(), EXECUTIONS["streamed"])
    error, where = worst_error(results(streamed, streamed(*inputs())), want)
    assert error < 1e-4, where


def test_weights_are_quantized_as_they_are_read(tmp_path):
    build("qwen3_moe", torch.bfloat16).save_pretrained(tmp_path)
    model, base = adapted("qwen3_moe", LORA).bfloat16(), folder_source(tmp_path)
    quantize_base(model)
    source = QuantizedSource(model, base, torch.device("cpu"))
    frozen = {name_in_base(name): p for name, p in model.named_parameters() if not is_of_adapter(name)}
    assert {*source.names} == {*frozen}
    for name, parameter in frozen.items():
        assert source.shape(name) == parameter.shape
        assert source.dtype(name) == parameter.dtype
        want = quantize(base.get(name.removesuffix(".quantized"))) if name.endswith(".quantized") else base.get(name)
        assert torch.equal(source.get(name), want)
        assert torch.equal(source.read(name, "fp32", 3, 5), want.flatten()[3:8])


def test_what_cannot_be_quantized_is_refused_by_name(monkeypatch):
    model = build("qwen3_moe")
    add_adapters(model, AdaptersConfig(lora_rank=2, lora_target_modules=EXPERTS))
    with pytest.raises(ConfigError, match=r"a stack of experts \(down_proj\)"):
        quantize_base(model)
    other = build("llama")
    other.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(ConfigError, match=r"does not quantize 1\.mlp\.experts\.0"):
        quantize_base(other)
    monkeypatch.setattr("megatron.hf.quantization.quantize", lambda weight: weight / None)
    with pytest.raises(ConfigError, match="cannot quantize on cpu"):
        check_quantization(torch.device("cpu"))
