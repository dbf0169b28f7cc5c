"""Dropout in the stream: the masks of the forward pass are the masks of the recomputed work of the backward pass."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.unit.model.small_model import (
    OFFLOADED,
    ON_DEVICE,
    PLAIN,
    assert_same_gradients,
    loss_and_gradients,
    relative_error,
    small_config,
    small_gpt_config,
    small_inputs,
    small_model,
)

SEED = 77
NEOX = partial(small_gpt_config, parallel_residual=True)
CONFIGS = pytest.mark.parametrize("config_of", [small_config, small_gpt_config, NEOX], ids=["llama", "gpt", "neox"])
ONE_CHUNK = replace(ON_DEVICE, chunk_size=1000)


def seeded(model, inputs):
    torch.manual_seed(SEED)
    return loss_and_gradients(model, inputs)


@CONFIGS
@pytest.mark.parametrize("offloading", [False, True], ids=["device", "host"])
def test_one_chunk_draws_the_masks_of_the_plain_model(config_of, offloading):
    config = config_of(hidden_dropout=0.3)
    inputs = small_inputs(config)
    loss, grads = seeded(small_model(config, replace(ONE_CHUNK, offloading=offloading)), inputs)
    plain_loss, plain = seeded(small_model(config, PLAIN), inputs)
    assert relative_error(loss, plain_loss) < 1e-14
    assert_same_gradients(grads, plain, 1e-12)


@CONFIGS
@pytest.mark.parametrize("slice_length", [8192, 5], ids=["whole chunks", "slices"])
@pytest.mark.parametrize("execution", [ON_DEVICE, OFFLOADED], ids=["device", "host"])
def test_gradients_of_several_chunks_are_finite_differences_of_the_loss(config_of, execution, slice_length):
    config = config_of(hidden_dropout=0.3)
    model, inputs = small_model(config, replace(execution, slice_length=slice_length)), small_inputs(config)
    _, gradients = seeded(model, inputs)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            torch.manual_seed(SEED)
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(model(*inputs))
                parameter.sub_(direction, alpha=step)
        slope = (losses[0] - losses[1]).item() / 2e-5
        expected = (gradients[name] * direction).sum().item()
        scale = gradients[name].norm().item() * direction.norm().item()
        assert abs(slope - expected) < 1e-6 * scale + 1e-7, name


def test_both_tiers_draw_the_same_masks_and_give_the_same_bits():
    config = small_config(hidden_dropout=0.2)
    inputs = small_inputs(config)
    loss, grads = seeded(small_model(config, ON_DEVICE), inputs)
    other_loss, other = seeded(small_model(config, OFFLOADED), inputs)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(grads[name], other[name]) for name in grads)


def test_masks_differ_between_chunks_and_layers_and_steps():
    config = small_config(hidden_dropout=0.5)
    model, inputs = small_model(config, ON_DEVICE), small_inputs(config)
    masks = []
    dropout = torch.nn.functional.dropout

    def spy(x, p, training):
        y = dropout(x, p, training)
        masks.append((y != 0).flatten()[:200])
        return y

    torch.manual_seed(SEED)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "dropout", spy)
        for _ in range(2):
            model(*inputs)
    num_chunks = 3
    assert len(masks) == 2 * num_chunks * (1 + 2 * config.num_layers)
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.parametrize("execution", [PLAIN, ON_DEVICE, OFFLOADED], ids=["plain", "device", "host"])
def test_the_backward_pass_leaves_the_random_generator_as_the_forward_pass_did(execution):
    config = small_config(hidden_dropout=0.2)
    model = small_model(config, execution)
    loss = model(*small_inputs(config))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("execution", [PLAIN, ON_DEVICE, OFFLOADED], ids=["plain", "device", "host"])
def test_two_microbatches_replay_their_own_masks(execution):
    config = small_config(hidden_dropout=0.2)
    model, inputs = small_model(config, execution), small_inputs(config)
    _, first = seeded(model, inputs)
    state = torch.get_rng_state()
    _, second = loss_and_gradients(model, inputs)
    assert not torch.equal(first["embedding.word_embeddings.weight"], second["embedding.word_embeddings.weight"])
    torch.manual_seed(SEED)
    losses = [model(*inputs)]
    torch.set_rng_state(state)
    losses.append(model(*inputs))
    model.zero_grad()
    sum(losses).backward()
    both = {name: p.grad for name, p in model.named_parameters()}
    assert_same_gradients(both, {name: first[name] + second[name] for name in first}, 1e-13)


@pytest.mark.parametrize("execution", [PLAIN, ON_DEVICE, OFFLOADED], ids=["plain", "device", "host"])
def test_evaluation_drops_nothing_and_draws_nothing(execution):
    config = small_config(hidden_dropout=0.5)
    model, inputs = small_model(config, execution).eval(), small_inputs(config)
    state = torch.get_rng_state()
    with torch.no_grad():
        loss = model(*inputs)
    assert torch.equal(torch.get_rng_state(), state)
    without = small_model(replace(config, hidden_dropout=0.0), execution)
    assert torch.equal(loss, without(*inputs).detach())
