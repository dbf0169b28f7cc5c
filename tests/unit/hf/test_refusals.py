"""What a model does that the stream would compute wrongly is refused by its name."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron.core.parallel_state import ParallelState
from megatron.hf.attention import MaskStandIn, Settings, attending, attention_function
from megatron.hf.building import build_hugging_face_model
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.masks import LayerMask, mask_of
from tests.families import EXPERTS, MLA
from tests.unit.hf.test_model import PLAIN
from tests.unit.hf.tiny_models import SIZES

CPU = torch.device("cpu")
LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (
            "mamba2",
            {"num_heads": 8, "n_groups": 2, "state_size": 8},
            r"layer 0 \(Mamba2Block\) does not call attention",
        ),
        ("qwen3_next", {**EXPERTS, **LINEAR_ATTENTION}, r"layer 0 \(Qwen3NextDecoderLayer\) does not call attention"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3}, "does not let its attention be chosen"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "LlamaForCausalLM"),
        ("deepseek_v32", MLA, "does not call attention before TypeError"),
        ("doge", {}, "between its layers"),
    ],
)
def test_a_model_is_refused_before_it_runs(kind, settings, message):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **settings}))
    with pytest.raises(UnsupportedModelError, match=message):
        build_hugging_face_model(model, ParallelState(), PLAIN)


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"block_indices": torch.zeros(1), "indices": None}, "passes block_indices to its attention"),
        ({"position_bias": 1.0, "head_mask": 2.0}, "passes head_mask, position_bias to its attention"),
        ({"is_causal": False}, "later tokens"),
    ],
)
def test_arguments_of_attention_that_are_not_understood_are_refused(argument, message):
    q = torch.zeros(1, 2, 3, 4)
    with attending(lambda call: call.q_BHTD), pytest.raises(UnsupportedModelError, match=message):
        attention_function(torch.nn.Identity(), q, q, q, None, scaling=1.0, position_ids=q, use_cache=False, **argument)


@pytest.mark.parametrize(
    "allows, want",
    [
        (lambda b, h, q, k: k <= q, LayerMask()),
        (lambda b, h, q, k: (k <= q) & (k > q - 300), LayerMask(window=300)),
        (lambda b, h, q, k: (k <= q) & (k > q - 128), LayerMask(window=128)),
        (lambda b, h, q, k: (k <= q) & (k // 128 == q // 128), LayerMask(local_block=128)),
        (lambda b, h, q, k: (k <= q) & (k > q - 299), None),
        (lambda b, h, q, k: (k <= q) | (k < 5), None),
        (lambda b, h, q, k: (k <= q) & (k >= q - 300), None),
        (lambda b, h, q, k: k[5] > q, None),
    ],
)
def test_a_mask_is_one_that_the_stream_has_or_is_refused(allows, want):
    mask, settings = MaskStandIn(allows, local_size=128, device=CPU), Settings(sliding_window=300)
    if want is not None:
        assert mask_of(mask, settings, "Layer") == want
        return
    with pytest.raises(UnsupportedModelError, match="mask of Layer"):
        mask_of(mask, settings, "Layer")


def test_a_layer_outside_of_the_stream_is_refused():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SIZES))
    build_hugging_face_model(model, ParallelState(), PLAIN)
    with pytest.raises(RuntimeError, match="outside of the stream"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
