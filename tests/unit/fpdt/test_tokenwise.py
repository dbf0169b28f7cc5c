import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron.core.head_layout import HeadLayout
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.store import ChunkStore
from megatron.fpdt.stream import Stream
from megatron.fpdt.tokenwise import stream_embedding
from megatron.ops.attention.reference import ReferenceAttention

ROWS, LENGTH, BATCH = 11, 23, 2


class Embedding(nn.Module):
    hidden_size = 6

    def __init__(self, dropout=0.0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Parameter(torch.randn(ROWS, 6, generator=generator, dtype=torch.float64).to(dtype))
        self.places = nn.Parameter(torch.randn(LENGTH, 6, generator=generator, dtype=torch.float64).to(dtype))
        self.dropout = dropout

    @property
    def uses_dropout(self):
        return self.dropout > 0

    def embed(self, tokens_BS, positions_BS):
        return F.dropout(self.words[tokens_BS.T] + self.places[positions_BS.T], self.dropout)


def tokens_and_positions():
    tokens = torch.randint(0, ROWS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))
    return tokens, torch.arange(LENGTH).expand(BATCH, LENGTH)


def stream_of(chunk_length=8, offloading=False):
    return Stream(
        ChunkStore(torch.device("cpu"), offloading),
        ReferenceAttention(),
        ParallelState(),
        HeadLayout(1, 1),
        chunk_length=chunk_length,
    )


def run(embedding, stream, dy):
    anchor = torch.zeros((), requires_grad=True)
    x = stream_embedding(stream, embedding, *tokens_and_positions(), anchor)
    x.backward(dy)
    return x.detach().clone(), [embedding.words.grad.clone(), embedding.places.grad.clone()], anchor.grad


def grad_of_output():
    return torch.randn(LENGTH, BATCH, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


@pytest.mark.parametrize("offloading", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("chunk_length", [1, 8, 64])
def test_the_stream_is_the_embedding_and_its_gradient(chunk_length, offloading):
    plain, embedding = Embedding(), Embedding()
    want = plain.embed(*tokens_and_positions())
    want.backward(grad_of_output())
    x, (words, places), anchor = run(embedding, stream_of(chunk_length, offloading), grad_of_output())
    assert torch.equal(x, want)
    torch.testing.assert_close(words, plain.words.grad, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(places, plain.places.grad, rtol=1e-14, atol=1e-14)
    assert anchor == 0


def test_a_strided_or_expanded_gradient_is_as_good_as_a_contiguous_one():
    dy = torch.ones((), dtype=torch.float64).expand(LENGTH, BATCH, 6)
    strided = grad_of_output().transpose(0, 1).contiguous().transpose(0, 1)
    for gradient in (dy, strided):
        for offloading in (False, True):
            got = run(Embedding(), stream_of(offloading=offloading), gradient)[1]
            want = run(Embedding(), stream_of(offloading=offloading), gradient.contiguous())[1]
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("offloading", [False, True], ids=["device", "host"])
def test_dropout_masks_are_those_of_the_forward_pass(offloading):
    """An element that was dropped has no gradient, an element that was kept has 1 / (1 - p)."""
    torch.manual_seed(3)
    embedding = Embedding(dropout=0.5)
    x, (words, places), _ = run(embedding, stream_of(5, offloading), grad_of_output())
    dx = grad_of_output() * (x != 0) * 2
    tokens, _ = tokens_and_positions()
    expected = torch.zeros_like(words).index_add_(0, tokens.T.flatten(), dx.flatten(0, 1))
    torch.testing.assert_close(words, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(places, dx.sum(1), rtol=1e-13, atol=1e-13)


def test_the_backward_pass_leaves_the_random_generator_alone():
    torch.manual_seed(3)
    embedding, anchor = Embedding(dropout=0.5), torch.zeros((), requires_grad=True)
    x = stream_embedding(stream_of(), embedding, *tokens_and_positions(), anchor)
    state = torch.get_rng_state()
    x.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_output_is_stored_on_the_tier_and_released_with_its_tensor():
    for offloading in (False, True):
        stream = stream_of(offloading=offloading)
        anchor = torch.zeros((), requires_grad=True)
        x = stream_embedding(stream, Embedding(), *tokens_and_positions(), anchor)
        assert stream.store.pool.owns(x) == offloading
        del x
        assert stream.store.pool.used_bytes == 0


def test_gradients_have_the_dtype_of_the_parameters_and_are_summed_in_fp32():
    embedding = Embedding(dtype=torch.bfloat16)
    with torch.no_grad():
        embedding.words.zero_()
    anchor = torch.zeros((), requires_grad=True)
    tokens, positions = torch.zeros(1, 1024, dtype=torch.int64), torch.zeros(1, 1024, dtype=torch.int64)
    stream_embedding(stream_of(chunk_length=2), embedding, tokens, positions, anchor).sum().backward()
    assert embedding.words.grad.dtype == torch.bfloat16
    assert embedding.words.grad[0, 0] == 1024


def test_one_frozen_parameter_gets_no_gradient():
    embedding = Embedding()
    embedding.places.requires_grad_(False)
    anchor = torch.zeros((), requires_grad=True)
    stream_embedding(stream_of(), embedding, *tokens_and_positions(), anchor).sum().backward()
    assert embedding.places.grad is None
    assert embedding.words.grad is not None


def test_a_frozen_embedding_lets_the_rest_train():
    embedding = Embedding().requires_grad_(False)
    anchor = torch.zeros((), requires_grad=True)
    stream_embedding(stream_of(), embedding, *tokens_and_positions(), anchor).sum().backward()
    assert embedding.words.grad is None
    assert anchor.grad == 0
