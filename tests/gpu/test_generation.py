"""Generation on a GPU: transformers' greedy tokens, the same bits with the cache on the host, and a query over it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.generation.generate import generate
from megatron.generation.loading import Inference, OpenedModel
from megatron.generation.sampling import Sampling
from megatron.ops.attention import choose_backend_for_few_queries
from tests.unit.fpdt.test_attention_tiles import attended, draw, softmax_of_all
from tests.unit.ops.attention.test_cpu_backends import request_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

VOCABULARY = 512
CHUNK = 160
NEW_TOKENS = 40
# Shorter than a chunk, one chunk and a token, and several chunks of which the last is short.
PROMPTS = [
    torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (7, CHUNK + 1, 1000)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA with random weights, in fp32, as Hugging Face saves it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=2048, initializer_range=0.05,
    )  # fmt: skip
    path: Path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def _generate(folder, dtype, offloading, num_tokens):
    model = OpenedModel(folder).build(Inference(torch.device("cuda", 0), dtype, CHUNK, offloading), 4096)
    return generate(model, PROMPTS, [num_tokens] * len(PROMPTS), Sampling(greedy=True))


@pytest.mark.parametrize("offloading", [False, True])
def test_greedy_tokens_are_those_of_transformers(folder, offloading):
    theirs = LlamaForCausalLM.from_pretrained(folder).to("cuda")
    for prompt, generated in zip(PROMPTS, _generate(folder, torch.float32, offloading, NEW_TOKENS), strict=True):
        ids = torch.tensor([prompt], device="cuda")
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        assert generated.tokens == expected[0, len(prompt) :].tolist()


def test_a_cache_on_the_host_changes_no_bit(folder):
    # More tokens than the buffer on the device holds, so that it is emptied into the cache.
    on_device, offloaded = (_generate(folder, torch.bfloat16, offloading, 1100) for offloading in (False, True))
    assert on_device == offloaded


@pytest.mark.parametrize("magnitude", [1.0, 1e4])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_size", [(32, 8, 128), (8, 8, 64), (6, 1, 96)])
def test_a_query_over_a_cache_in_bf16_is_right_wherever_it_rests(num_heads, num_kv_heads, head_size, magnitude):
    q, parts = draw([20000, 4097, 1000, 129, 1, 1], num_heads, num_kv_heads, magnitude, head_size)
    q, *parts = (t.cuda().bfloat16() for t in (q, *parts))
    backend = choose_backend_for_few_queries(request_for(q.device, q.dtype, head_size))
    assert backend.name == "torch-flash"
    on_device, offloaded = (attended(backend, q, parts, offloading) for offloading in (False, True))
    assert torch.equal(on_device, offloaded)
    exact = softmax_of_all(q.double(), [part.double() for part in parts])
    assert (on_device - exact).norm() < 2**-7 * exact.norm()
