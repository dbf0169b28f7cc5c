"""Adapters in files: what peft writes is read, what is written is what peft reads, and merged weights are peft's."""

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from megatron.config import AdaptersConfig
from megatron.hf.adapter_export import write_adapter
from megatron.hf.adapter_weights import (
    AdaptedSource,
    InitialAdapter,
    MergedSource,
    SavedAdapter,
    digest_of_weights,
    name_in_file,
)
from megatron.hf.adapters import add_adapters, is_of_adapter, lora_config
from megatron.hf.export import Target, save_folder
from megatron.hf.materialization import empty_model
from megatron.hf.weights import folder_source
from megatron.weights.errors import WeightsError
from megatron.weights.published_config import read_published_config
from tests.unit.hf.test_adapters import EXPERTS, adapted
from tests.unit.hf.tiny_models import build

CASES = {
    "llama": ("llama", AdaptersConfig(lora_rank=2)),
    "llama-tied-dora": ("llama-tied", AdaptersConfig(lora_rank=3, lora_alpha=5.0, use_dora=True)),
    "gpt2-dora": ("gpt2", AdaptersConfig(lora_rank=2, use_dora=True)),
    "qwen3_moe-experts": ("qwen3_moe", AdaptersConfig(lora_rank=2, lora_target_modules=EXPERTS)),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def base(case, tmp_path):
    folder = tmp_path / "base"
    build(case[0], torch.bfloat16).save_pretrained(folder)
    return folder


def trained(case):
    """Adapters with random weights, by name, and the empty model that has them."""
    family, settings = case
    tensors = {
        name: p.detach().bfloat16() for name, p in adapted(family, settings).named_parameters() if p.requires_grad
    }
    empty = empty_model(build(family).config, torch.bfloat16)
    add_adapters(empty, settings)
    return tensors, empty


def test_a_written_adapter_is_what_peft_loads(case, base, tmp_path):
    tensors, empty = trained(case)
    write_adapter(tensors, lora_config(build(case[0]), case[1]), tmp_path / "adapter", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter", autocast_adapter_dtype=False)
    got = {name: p for name, p in loaded.base_model.model.named_parameters() if is_of_adapter(name)}
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(WeightsError, match="exists and is not an empty folder"):
        write_adapter(tensors, lora_config(build(case[0]), case[1]), tmp_path / "adapter", base)
    read = AdaptedSource(empty, folder_source(base), SavedAdapter(empty, tmp_path / "adapter"))
    assert all(torch.equal(read.get(name), tensor) for name, tensor in tensors.items())
    whole = dict(model.named_parameters())
    frozen = [name for name in read.names if not is_of_adapter(name)]
    assert frozen
    assert all(torch.equal(read.get(name), whole[name]) for name in frozen)


def test_merged_weights_are_those_of_peft(case, base, tmp_path):
    tensors, empty = trained(case)
    write_adapter(tensors, lora_config(build(case[0]), case[1]), tmp_path / "adapter", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    want = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = MergedSource(empty, folder_source(base), tensors)
    save_folder(merged, read_published_config(base), Target(tmp_path / "merged"))
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert any(not torch.equal(folder_source(base).get(name), want[name]) for name in merged.names)


def test_adapters_begin_as_those_of_peft_do(case, base):
    _, empty = trained(case)
    source = InitialAdapter(empty, folder_source(base), seed=1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = get_peft_model(model, lora_config(model, case[1])).base_model.model
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert {*source.names} == {*named}
    for name, parameter in named.items():
        ours = source.get(name)
        assert ours.shape == parameter.shape
        if ".lora_A." in name:
            assert float(ours.abs().max()) <= ours.shape[1] ** -0.5
            assert float(ours.std()) == pytest.approx(ours.shape[1] ** -0.5 / 3**0.5, rel=0.3)
        else:
            torch.testing.assert_close(ours, parameter.float(), rtol=1e-2, atol=1e-6)


def test_adapters_of_another_run_are_refused_by_name(base, case, tmp_path):
    tensors, empty = trained(case)
    first = next(iter(tensors))
    config = lora_config(build(case[0]), case[1])
    write_adapter({name: t for name, t in tensors.items() if name != first}, config, tmp_path / "fewer", base)
    with pytest.raises(WeightsError, match=re.escape(f"has no '{name_in_file(first)}'")):
        SavedAdapter(empty, tmp_path / "fewer")
    write_adapter(tensors | {first: tensors[first][:1]}, config, tmp_path / "smaller", base)
    with pytest.raises(WeightsError, match=re.escape(f"{first} is [1, ")):
        AdaptedSource(empty, folder_source(base), SavedAdapter(empty, tmp_path / "smaller"))


def test_a_digest_is_of_values_and_of_no_file(base):
    digest = digest_of_weights(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    assert digest_of_weights(base) == digest
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save_pretrained(base, max_shard_size="20KB")
    assert digest_of_weights(base) != digest
