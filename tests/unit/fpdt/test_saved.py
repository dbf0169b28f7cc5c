"""What a block saves for backward, and what it recomputes."""

from dataclasses import replace

import pytest
import torch

from megatron.config import Recompute
from megatron.ops import linear as linear_module
from tests.unit.fpdt.one_block import CONFIGS, LENGTH, TIERS, one_layer, positions, residual, run_layer
from tests.unit.model.small_model import (
    OFFLOADED,
    loss_and_gradients,
    small_config,
    small_inputs,
    small_model,
)


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("recompute", [Recompute.ALL, Recompute.ATTENTION])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@TIERS
def test_rebuilt_inputs_and_recomputed_attention_change_no_bit(execution, interval, recompute, dropout):
    config = small_config(LENGTH, num_layers=5, hidden_dropout=dropout)
    inputs = small_inputs(config)
    results = []
    for each in (execution, replace(execution, checkpoint_interval=interval, recompute=recompute)):
        model = small_model(config, each)
        torch.manual_seed(7)
        results.append(loss_and_gradients(model, inputs))
    (loss, gradients), (other_loss, others) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@TIERS
@CONFIGS
@pytest.mark.parametrize("recompute", [Recompute.ATTENTION, Recompute.KV, Recompute.MLP, Recompute.NONE])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("slice_length", [3, 16])
def test_what_is_saved_for_backward_changes_no_bit(execution, config_of, recompute, dropout, slice_length):
    results = []
    for each in (execution, replace(execution, recompute=recompute)):
        torch.manual_seed(7)
        results.append(run_layer(each, slice_length=slice_length, config_of=config_of, hidden_dropout=dropout))
    (y, grads), (other_y, other_grads) = results
    assert torch.equal(y, other_y)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


#   chunks of 16, 16 and 8 tokens in slices of 4: 10 slices, 3 of them a chunk's first
@pytest.mark.parametrize(
    "recompute, products, of_first_slices",
    [
        (Recompute.ATTENTION, 10 + 10 + 10 + 10, 0),
        (Recompute.KV, 8 + 10 + 10 + 10, 0),
        (Recompute.ALL, 10 + 10 + 10, 0),
        (Recompute.MLP, 10, 3),
        (Recompute.NONE, 0, 3 + 3),
    ],
)
@TIERS
def test_only_the_chosen_products_are_recomputed(execution, recompute, products, of_first_slices, monkeypatch):
    """Those of first slices are saved on the device, but not offloaded."""
    _, layer = one_layer(replace(execution, recompute=recompute, slice_length=4))
    y = layer(residual().requires_grad_(), positions())
    computed = []
    product = linear_module.F.linear
    monkeypatch.setattr(linear_module.F, "linear", lambda *args: computed.append(args) or product(*args))
    y.backward(residual(seed=2))
    assert len(computed) == products + of_first_slices * execution.offloading


@pytest.mark.parametrize("recompute", [Recompute.ALL, Recompute.ATTENTION])
def test_two_forward_passes_before_their_backward_passes_do_not_share_a_chain(recompute):
    config = small_config(LENGTH, num_layers=3)
    first, second = small_inputs(config), tuple(t.flip(0).contiguous() for t in small_inputs(config))
    gradients = []
    for interval in (1, 2):
        model = small_model(config, replace(OFFLOADED, checkpoint_interval=interval, recompute=recompute))
        losses = [model(*inputs) for inputs in (first, second)]
        for loss in losses:
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
