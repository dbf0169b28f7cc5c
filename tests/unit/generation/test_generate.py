"""What is generated over a cache is what transformers generates; its logits are those of all tokens run at once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron.generation.cached_model import CachedModel
from megatron.generation.errors import GenerationError
from megatron.generation.generate import generate
from megatron.generation.loading import Inference, OpenedModel
from megatron.generation.sampling import Sampling
from megatron.weights.hugging_face import Settings, from_hugging_face
from tests.unit.weights.small_families import POSITIONS, VOCAB, our_logits, save

CHUNK = 8
NEW = 12
GREEDY = Sampling(greedy=True)
# around the boundaries of chunks, and one that leaves room for the new tokens and no more
LENGTHS = (1, 2, 7, 8, 9, 16, 23, POSITIONS - NEW)
MODELS = ("llama", "llama-llama3", "gpt2", "pythia", "qwen2", "qwen3", "mistral")


def prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def opened(
    folder: Path, dtype: torch.dtype = torch.float32, offloading: bool = True, chunk_size: int = CHUNK, **options: bool
) -> CachedModel:
    inference = Inference(torch.device("cpu"), dtype, chunk_size=chunk_size, offloading=offloading, **options)
    return OpenedModel(folder).build(inference, POSITIONS)


def their_tokens(model: nn.Module, tokens: Sequence[int], end: int | None = None) -> list[int]:
    generated = model.generate(
        torch.tensor([tokens]), do_sample=False, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0
    )
    return generated[0, len(tokens) :].tolist()


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model of transformers and the folder that it is in."""
    folder = tmp_path_factory.mktemp("theirs")
    return save(request.param, folder), folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save("llama", tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("offloading", [False, True], ids=["device", "offloading"])
def test_greedy_tokens_of_unequal_prompts_are_those_of_transformers(
    both: tuple[nn.Module, Path], offloading: bool
) -> None:
    theirs, folder = both
    prompts = [prompt(length) for length in LENGTHS]
    generated = generate(opened(folder, offloading=offloading), prompts, [NEW] * len(prompts), GREEDY)
    assert [each.tokens for each in generated] == [their_tokens(theirs, tokens) for tokens in prompts]


def test_generation_ends_where_transformers_ends(both: tuple[nn.Module, Path]) -> None:
    theirs, folder = both
    prompts = [prompt(length) for length in LENGTHS]
    end = their_tokens(theirs, prompts[3])[4]
    generated = generate(opened(folder), prompts, [NEW] * len(prompts), GREEDY, end)
    assert [each.tokens for each in generated] == [their_tokens(theirs, tokens, end) for tokens in prompts]
    assert [each.ended for each in generated] == [each.tokens[-1] == end for each in generated]
    assert generated[3].ended


def test_logits_of_each_step_are_those_of_all_tokens_at_once(both: tuple[nn.Module, Path]) -> None:
    _, folder = both
    model = opened(folder, torch.float64)
    tokens = torch.tensor([prompt(37), [*prompt(36), 5]])
    whole = our_logits(model.model, tokens)
    first, second = (model.prefill(row[:length].tolist()) for row, length in zip(tokens, (16, 21), strict=True))
    assert_close(first[1], whole[0, 15])
    assert_close(second[1], whole[1, 20])
    for step in range(16):
        columns = torch.tensor([16 + step, 21 + step])
        logits = model.logits(model.extend([first[0], second[0]], tokens[[0, 1], columns][:, None]))
        assert_close(logits[0], whole[[0, 1], columns])


def test_several_tokens_may_follow_at_once(llama: Path) -> None:
    model = opened(llama, torch.float64)
    tokens = torch.tensor([prompt(30)])
    cache, _ = model.prefill(tokens[0, :11].tolist())
    parts = [model.extend([cache], part) for part in tokens[:, 11:].split([1, 5, 1, 12], 1)]
    assert_close(model.logits(torch.cat(parts))[:, 0], our_logits(model.model, tokens)[0, 11:])


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want[..., : got.shape[-1]], rtol=1e-9, atol=1e-9)


def test_padding_of_the_vocabulary_is_never_sampled(tmp_path: Path, llama: Path) -> None:
    from_hugging_face(llama, tmp_path / "padded", Settings(), make_vocab_size_divisible_by=256)
    padded, plain = opened(tmp_path / "padded"), opened(llama)
    assert padded.model.embedding.word_embeddings.weight.shape[0] == 256
    torch.testing.assert_close(padded.prefill(prompt(9))[1], plain.prefill(prompt(9))[1])


def test_the_cache_is_stored_on_the_host_when_offloading_and_released(llama: Path) -> None:
    model = opened(llama)
    cache, _ = model.prefill(prompt(20))
    pool = model.stream.store.pool
    assert all(pool.owns(part) for layer in range(2) for part in cache.parts(layer))
    config = OpenedModel(llama).portable.model
    width = 2 * config.num_key_value_heads * config.kv_channels
    assert cache.num_bytes == pool.used_bytes == 20 * width * 4 * config.num_layers
    slabs = pool.num_slabs
    del cache
    for _ in range(3):
        model.prefill(prompt(20))
    assert pool.num_slabs == slabs


def test_chunks_come_to_the_device_once_per_layer_and_token(llama: Path) -> None:
    model = opened(llama)
    cache, _ = model.prefill(prompt(20))
    before = model.stream.store.copied.bytes_in
    model.extend([cache], torch.tensor([[7]]))
    assert model.stream.store.copied.bytes_in - before == 20 * 2 * 2 * 12 * 4 * 2


def test_isolated_chunks_see_themselves_alone(llama: Path) -> None:
    model = opened(llama, torch.float64, isolated_chunks=True)
    tokens = prompt(21)
    changed = [(token + 1) % VOCAB for token in tokens[:16]] + tokens[16:]
    alone, whole = model.prefill(tokens)[1], opened(llama, torch.float64).prefill(tokens)[1]
    assert torch.equal(alone, model.prefill(changed)[1])
    assert not torch.allclose(alone, whole)
    # rotary positions are relative
    torch.testing.assert_close(alone, opened(llama, torch.float64).prefill(tokens[16:])[1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_unusable_prompts_are_refused(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / name)
    model = opened(tmp_path / name)
    with pytest.raises(GenerationError, match="the prompt has no tokens"):
        generate(model, [[1], []], [1, 1], GREEDY)
    for token in (VOCAB, -1):
        with pytest.raises(GenerationError, match=f"token id {token} of the prompt is outside .* ids 0 to {VOCAB - 1}"):
            generate(model, [[1], [token]], [1, 1], GREEDY)
    too_long = [prompt(POSITIONS - 3)]
    if name == "llama":
        assert len(generate(model, too_long, [4], GREEDY)[0].tokens) == 4
        return
    assert len(generate(model, too_long, [3], GREEDY)[0].tokens) == 3
    with pytest.raises(GenerationError, match=r"45 tokens\) and 4 new ones pass the 48 positions .* at most 3 new"):
        generate(model, too_long, [4], GREEDY)


def test_seeds_repeat_and_a_prompt_draws_alone(llama: Path) -> None:
    model, sampling = opened(llama), Sampling(temperature=0.8)
    prompts = [prompt(5), prompt(11), prompt(11)]
    first = generate(model, prompts, [NEW] * 3, sampling, seed=3)
    again = generate(model, prompts, [NEW] * 3, sampling, seed=3)
    other = generate(model, prompts, [NEW] * 3, sampling, seed=7)
    (alone,) = generate(model, prompts[:1], [NEW], sampling, seed=3)
    assert [each.tokens for each in first] == [each.tokens for each in again]
    assert [each.tokens for each in first] != [each.tokens for each in other]
    assert alone.tokens == first[0].tokens
    assert first[1].tokens != first[2].tokens


def test_each_prompt_has_a_limit_of_its_own(llama: Path) -> None:
    generated = generate(opened(llama), [prompt(5), prompt(9), prompt(4)], [3, 1, 7], GREEDY)
    assert [len(each.tokens) for each in generated] == [3, 1, 7]


def test_log_probabilities_are_those_of_the_whole_distribution(llama: Path) -> None:
    model, tokens = opened(llama), prompt(10)
    (generated,) = generate(model, [tokens], [5], Sampling(top_k=3, temperature=2.0))
    logits = our_logits(model.model, torch.tensor([tokens + generated.tokens]))[0, 9:-1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(generated.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(generated.log_probabilities), want)


@pytest.mark.parametrize("limit", [{"window": 5}, {"local_block": 8}], ids=str)
def test_a_window_is_refused(llama: Path, limit: dict[str, int]) -> None:
    model = opened(llama).model
    attention = model.layers[1].self_attention
    attention.variant = replace(attention.variant, **limit)
    with pytest.raises(GenerationError, match=r"layers \[2\] have a sliding window or local blocks, which the cache"):
        CachedModel(model, VOCAB)
