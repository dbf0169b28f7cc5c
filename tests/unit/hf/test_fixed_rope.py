"""RoPE that follows the largest position gives the same in slices as for the whole sequence."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron.hf.fixed_rope import fix_rope
from megatron.hf.proof import prove
from megatron.hf.shrinking import shrink

LENGTH = 61
# Frequencies change beyond 16 positions in the small copies.
MODELS = {
    "llama": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "phi3": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + i / 9 for i in range(48)], "long_factor": [2.0 + i for i in range(48)],
    },
    "phimoe": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, "short_mscale": 1.2,
        "short_factor": [1.0 + i / 9 for i in range(64)], "long_factor": [2.0 + i for i in range(64)],
        "long_mscale": 1.3,
    },
}  # fmt: skip


def rope_of(name):
    config = shrink(CONFIG_MAPPING[name](rope_parameters=MODELS[name], max_position_embeddings=131072))
    model = AutoModelForCausalLM.from_config(config)
    return model, next(module for module in model.modules() if hasattr(module, "rope_type"))


@pytest.mark.parametrize("name", MODELS)
def test_slices_get_what_the_whole_sequence_gets(name):
    positions, x = torch.arange(LENGTH)[None], torch.zeros(1, 1, 1)
    whole = torch.stack(rope_of(name)[1](x, positions))
    slices = [[0, 1, 2], [15, 16, 17], [60], [3, 40]]
    unfixed, (model, rope) = rope_of(name)[1], rope_of(name)
    fix_rope(model, LENGTH)
    for each in slices:
        assert torch.equal(torch.stack(rope(x, torch.tensor([each, each]))), whole[:, :, each].expand(2, 2, -1, -1))
    assert not torch.equal(torch.stack(unfixed(x, torch.tensor([slices[0]]))), whole[:, :, :3])


def test_other_rope_is_left_alone():
    model = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING["llama"]()))
    before = model.model.rotary_emb.inv_freq.clone()
    fix_rope(model, LENGTH)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert "forward" not in vars(model.model.rotary_emb)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_such_rope_trains_as_in_transformers(name):
    prove(CONFIG_MAPPING[name](rope_parameters=MODELS[name], max_position_embeddings=131072))
