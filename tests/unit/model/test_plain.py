from dataclasses import replace

import pytest
import torch

from megatron.model.builder import Execution
from tests.unit.model.small_model import (
    PLAIN,
    Reports,
    loss_and_gradients,
    small_config,
    small_gpt_config,
    small_inputs,
    small_model,
)

CONFIGS = pytest.mark.parametrize("config_of", [small_config, small_gpt_config], ids=["llama", "gpt"])
RECOMPUTED = {
    "recompute": Execution(activation_checkpointing=True),
    "in cpu": Execution(activation_checkpointing=True, checkpoint_in_cpu=True),
}
DROPOUTS = {
    "no dropout": {},
    "hidden dropout": {"hidden_dropout": 0.3},
    "attention dropout": {"attention_dropout": 0.3},
    "both": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}


def seeded(model, inputs):
    torch.manual_seed(5)
    return loss_and_gradients(model, inputs)


@CONFIGS
@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS.keys())
@pytest.mark.parametrize("execution", RECOMPUTED.values(), ids=RECOMPUTED.keys())
def test_recomputation_changes_no_bit(config_of, dropout, execution):
    config = config_of(**dropout)
    inputs = small_inputs(config)
    loss, gradients = seeded(small_model(config, PLAIN, torch.float32), inputs)
    other_loss, other = seeded(small_model(config, execution, torch.float32), inputs)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other[name]) for name in gradients)


@pytest.mark.parametrize("execution", [PLAIN, *RECOMPUTED.values()], ids=["saved", *RECOMPUTED])
def test_gradients_under_attention_dropout_are_finite_differences_of_the_loss(execution):
    config = small_config(attention_dropout=0.4)
    model, inputs = small_model(config, execution), small_inputs(config)
    _, gradients = seeded(model, inputs)
    for name in ("layers.0.self_attention.query_key_value.weight", "layers.1.self_attention.dense.weight"):
        parameter = dict(model.named_parameters())[name]
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            torch.manual_seed(5)
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(model(*inputs))
                parameter.sub_(direction, alpha=step)
        slope = (losses[0] - losses[1]).item() / 2e-5
        assert slope == pytest.approx((gradients[name] * direction).sum().item(), rel=1e-6, abs=1e-6)


def test_attention_dropout_changes_the_loss_with_the_seed_and_not_in_evaluation():
    config = small_config(attention_dropout=0.4)
    model, inputs = small_model(config), small_inputs(config)
    with torch.no_grad():
        assert not torch.equal(model(*inputs), model(*inputs))
        model.eval()
        state = torch.get_rng_state()
        assert torch.equal(model(*inputs), model(*inputs))
        assert torch.equal(torch.get_rng_state(), state)
    without = small_model(replace(config, attention_dropout=0.0))
    assert torch.equal(model(*inputs), without(*inputs))


@pytest.mark.parametrize("limit", [{"window": 5}, {"softcap": 2.0}], ids=str)
def test_attention_dropout_with_a_window_or_a_softcap_is_refused(limit):
    config = small_config(attention_dropout=0.4)
    model = small_model(config)
    attention = model.layers[0].self_attention
    attention.variant = replace(attention.variant, **limit)
    with pytest.raises(ValueError, match=r"attention dropout \(0.4\) cannot be combined with a softcap, a sliding"):
        model(*small_inputs(config))
    model.eval()
    assert model(*small_inputs(config)).isfinite()


def test_attention_dropout_has_the_mean_of_no_dropout():
    config = small_config(attention_dropout=0.2, num_layers=1)
    model = small_model(config)
    layer, x = model.layers[0], torch.randn(config.seq_length, 1, config.hidden_size, dtype=torch.float64)
    positions = torch.arange(config.seq_length)[None]
    outputs = []
    layer.after = lambda x, o: (torch.zeros_like(o), o)  # the attention output alone, in which dropout is linear
    with torch.no_grad():
        torch.manual_seed(0)
        outputs = [layer(x, positions) for _ in range(400)]
        layer.eval()
        want = layer(x, positions)
    error = (torch.stack(outputs).mean(0) - want).norm() / want.norm()
    assert error < 0.06


def test_a_step_reports_every_layer_once():
    reports = Reports()
    config = small_config()
    model = small_model(config, replace(PLAIN, observer=reports))
    model(*small_inputs(config)).backward()
    assert reports.chunks == [("forward", 1, 0), ("forward", 2, 0)]


def test_evaluation_does_not_recompute():
    reports = Reports()
    config = small_config()
    model = small_model(config, replace(Execution(activation_checkpointing=True), observer=reports))
    with torch.no_grad():
        model(*small_inputs(config))
    assert len(reports.chunks) == config.num_layers


@pytest.mark.parametrize("execution", [PLAIN, *RECOMPUTED.values()], ids=["saved", *RECOMPUTED])
def test_a_frozen_block_passes_the_gradient_on(execution):
    config = small_config()
    model, inputs = small_model(config, execution), small_inputs(config)
    _, want = loss_and_gradients(model, inputs)
    model.layers[1].requires_grad_(False)
    _, got = loss_and_gradients(model, inputs)
    assert all((gradient is None) == name.startswith("layers.1.") for name, gradient in got.items())
    torch.testing.assert_close(
        got["layers.0.mlp.dense_h_to_4h.weight"], want["layers.0.mlp.dense_h_to_4h.weight"], rtol=1e-13, atol=1e-14
    )
