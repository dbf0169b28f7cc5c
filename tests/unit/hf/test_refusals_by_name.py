"""Models that cannot be streamed are refused by name, with what to do."""

import re

import pytest
from transformers import CONFIG_MAPPING

from megatron.config.errors import ConfigError
from megatron.hf.refusals import refuse
from megatron.hf.shrinking import shrink
from megatron.hf.structure import refuse_structure

BY_CONFIGURATION = [
    ("gemma4_text", {}, "every layer reads an embedding of its own (hidden_size_per_layer_input=256)"),
    ("gemma3n_text", {}, "every layer reads an embedding of its own"),
    ("qwen3_next", {}, "36 of its 48 layers carry a state from token to token"),
    ("mamba", {}, "32 of its 32 layers carry a state from token to token"),
    ("jamba", {}, "28 of its 32 layers carry a state from token to token"),
    ("rwkv", {}, "it has no attention heads"),
    ("bart", {}, "it is an encoder with a decoder"),
    ("gemma3", {}, "it is made of several models (vision_config)"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "its tokens attend to later ones"),
    ("gpt2", {"add_cross_attention": True}, "its layers attend to another sequence (add_cross_attention)"),
    ("bloom", {}, "adds a bias to every attention score (ALiBi)"),
    ("opt", {"layerdrop": 0.1}, "skips layers at random (layerdrop=0.1); set layerdrop to 0"),
]
BY_STRUCTURE = [
    ("bert", "its tokens attend to later ones"),
    ("openai-gpt", "calls attention 0 times, and must call it once"),
    ("diffllama", "calls attention 2 times, and must call it once"),
    ("deepseek_v4", "input_ids of layer 0 (DeepseekV4DecoderLayer) depends on the tokens"),
    ("dory", "runs 2 times in a pass, and must run once"),
]


@pytest.mark.parametrize("name, settings, message", BY_CONFIGURATION)
def test_a_configuration_is_refused_before_a_model_is_built(name, settings, message):
    with pytest.raises(
        ConfigError, match=rf"the Hugging Face model \({name}\) cannot be streamed: .*{re.escape(message)}"
    ):
        refuse(CONFIG_MAPPING[name](**settings))


@pytest.mark.parametrize("name, message", BY_STRUCTURE)
def test_a_structure_is_refused_after_a_run_of_a_small_copy(name, message):
    if name not in CONFIG_MAPPING:
        pytest.skip("needs a newer transformers")
    config = CONFIG_MAPPING[name]()
    refuse(config)
    with pytest.raises(ConfigError, match=rf"\({name}\) cannot be streamed: .*{re.escape(message)}"):
        refuse_structure(shrink(config))


def test_code_that_comes_with_a_folder_is_refused():
    foreign = type("ForeignConfig", (CONFIG_MAPPING["llama"],), {"__module__": "transformers_modules.mine"})
    with pytest.raises(ConfigError, match=r"its code \(transformers_modules.mine\) is not part of transformers"):
        refuse(foreign())


def test_every_refusal_says_what_to_do():
    for name, settings, _ in BY_CONFIGURATION:
        with pytest.raises(ConfigError, match=r"; (train|choose|set|save) "):
            refuse(CONFIG_MAPPING[name](**settings))
