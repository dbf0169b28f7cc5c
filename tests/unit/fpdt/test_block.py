"""A streamed block computes what the plain block does."""

from dataclasses import replace

import pytest
import torch

from megatron.config import Recompute
from tests.unit.fpdt.one_block import CONFIGS, LENGTH, TIERS, one_layer, positions, residual, run_layer
from tests.unit.model.small_model import (
    OFFLOADED,
    ON_DEVICE,
    PLAIN,
    Reports,
    assert_same_gradients,
    loss_and_gradients,
    relative_error,
    small_config,
    small_inputs,
    small_model,
)


@TIERS
@CONFIGS
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 40, 1000])
def test_a_streamed_block_is_the_plain_block(execution, config_of, chunk_size):
    want_y, want = run_layer(PLAIN, config_of=config_of)
    y, got = run_layer(replace(execution, chunk_size=chunk_size), config_of=config_of)
    assert relative_error(y, want_y) < 1e-14
    # Without rotary positions the key bias has no gradient, only rounding: its part of the fused bias is small.
    assert_same_gradients(got, want, 1e-12)


@TIERS
@pytest.mark.parametrize("slice_length", [1, 3, 8, 15, 16])
def test_the_length_of_a_slice_changes_nothing_but_rounding(execution, slice_length):
    want_y, want = run_layer(execution)
    y, got = run_layer(execution, slice_length=slice_length)
    assert relative_error(y, want_y) < 1e-15
    assert_same_gradients(got, want, 1e-13)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_both_tiers_give_the_same_bits(dtype, config_of):
    y, grads = run_layer(ON_DEVICE, dtype=dtype, config_of=config_of)
    other_y, other_grads = run_layer(OFFLOADED, dtype=dtype, config_of=config_of)
    assert torch.equal(y, other_y)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_a_bf16_stream_errs_no_more_than_the_plain_block_in_bf16():
    (exact_y, exact), (plain_y, plain), (y, got) = (
        run_layer(PLAIN),
        run_layer(PLAIN, dtype=torch.bfloat16),
        run_layer(OFFLOADED, dtype=torch.bfloat16),
    )
    assert relative_error(y, exact_y) <= 1.5 * relative_error(plain_y, exact_y)
    for name, gradient in got.items():
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, exact[name]) <= 1.5 * relative_error(plain[name], exact[name]) + 1e-3, name


@TIERS
@pytest.mark.parametrize(
    "strided",
    [
        lambda dy: dy[:1, :1].expand_as(dy),
        lambda dy: torch.ones((), dtype=dy.dtype).expand_as(dy),
        lambda dy: dy.transpose(0, 2).contiguous().transpose(0, 2),
        lambda dy: torch.cat([dy, dy], 2)[..., ::2],
    ],
    ids=["expanded", "scalar", "transposed", "every second"],
)
def test_a_strided_or_expanded_incoming_gradient_is_as_good_as_a_contiguous_one(execution, strided):
    dy = strided(residual(seed=2))
    assert not dy.is_contiguous()
    _, want = run_layer(execution, dy.contiguous())
    _, got = run_layer(execution, dy)
    assert all(torch.equal(got[name], want[name]) for name in want)


@TIERS
def test_nothing_that_the_backward_pass_reads_is_written_to(execution):
    _, layer = one_layer(execution)
    x, dy = residual().requires_grad_(), residual(seed=2)
    y = layer(x, positions())
    saved = y.grad_fn.block.inputs._steps[0].saved
    read = [x, y, dy, *saved.o_cBHD, *saved.lse_BHC, *saved.kv_CBKD.values(), *layer.parameters()]
    before = [t.detach().clone() for t in read]
    y.backward(dy)
    assert len(read) > 10
    assert all(torch.equal(t, original) for t, original in zip(read, before, strict=True))


@TIERS
def test_a_second_backward_pass_is_a_clear_error(execution):
    _, layer = one_layer(execution)
    y = layer(residual().requires_grad_(), positions())
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a streamed backward pass runs once.*whatever retain_graph says"):
        y.sum().backward()


@TIERS
def test_writing_into_the_input_between_the_passes_is_noticed(execution):
    _, layer = one_layer(execution)
    x = residual().requires_grad_()
    y = layer(x, positions())
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_two_passes_before_two_backward_passes_do_not_share_anything():
    _, layer = one_layer(OFFLOADED)
    xs = [residual(seed=seed).requires_grad_() for seed in (1, 5)]
    ys = [layer(x, positions()) for x in xs]
    for y in ys:
        y.backward(residual(seed=2))
    for x in xs:
        alone = x.detach().clone().requires_grad_()
        layer(alone, positions()).backward(residual(seed=2))
        assert torch.equal(x.grad, alone.grad)


def test_evaluation_gives_the_bits_of_training_without_dropout():
    _, layer = one_layer(OFFLOADED)
    trained = layer(residual().requires_grad_(), positions())
    with torch.no_grad():
        assert torch.equal(layer(residual(), positions()), trained)


@TIERS
def test_frozen_parameters_get_no_gradient_and_the_others_keep_theirs(execution):
    _, want = run_layer(execution)
    _, layer = one_layer(execution)
    frozen = {"input_layernorm.weight", "self_attention.dense.weight", "mlp.dense_h_to_4h.weight"}
    parameters = dict(layer.named_parameters())
    for name in frozen:
        parameters[name].requires_grad_(False)
    x = residual().requires_grad_()
    layer(x, positions()).backward(residual(seed=2))
    got = {"x": x.grad, **{name: p.grad for name, p in parameters.items()}}
    assert_same_gradients(got, {name: None if name in frozen else t for name, t in want.items()}, 1e-13)


@TIERS
def test_a_wholly_frozen_block_passes_the_gradient_on(execution):
    _, want = run_layer(execution)
    _, layer = one_layer(execution)
    layer.requires_grad_(False)
    x = residual().requires_grad_()
    layer(x, positions()).backward(residual(seed=2))
    assert relative_error(x.grad, want["x"]) < 1e-14
    assert all(p.grad is None for p in layer.parameters())


@TIERS
def test_a_block_trains_on_an_input_that_needs_no_gradient(execution):
    _, want = run_layer(execution)
    _, layer = one_layer(execution)
    layer(residual(), positions()).backward(residual(seed=2))
    assert relative_error(layer.mlp.dense_4h_to_h.weight.grad, want["mlp.dense_4h_to_h.weight"]) < 1e-14


def test_gradients_accumulate_over_backward_passes_like_those_of_any_module():
    config = small_config(LENGTH)
    model, inputs = small_model(config, OFFLOADED), small_inputs(config)
    _, once = loss_and_gradients(model, inputs)
    model(*inputs).backward()
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("chunk_size", [16, 40, 1000])
def test_a_step_reports_every_chunk_of_every_layer_once_in_each_direction(chunk_size, offloading):
    reports = Reports()
    config = small_config(LENGTH)
    execution = replace(ON_DEVICE, chunk_size=chunk_size, offloading=offloading)
    model = small_model(config, replace(execution, observer=reports))
    model(*small_inputs(config)).backward()
    num_chunks = -(-LENGTH // chunk_size)
    forward = [("forward", layer, chunk) for layer in (1, 2) for chunk in range(num_chunks)]
    backward = [("backward", *where) for _, *where in reversed(forward)]
    assert reports.chunks == forward + backward


def test_recomputed_forward_passes_are_reported_as_such():
    reports = Reports()
    config = small_config(LENGTH, num_layers=3)
    execution = replace(ON_DEVICE, recompute=Recompute.ATTENTION, checkpoint_interval=2)
    model = small_model(config, replace(execution, observer=reports))
    model(*small_inputs(config)).backward()
    assert [phase for phase, _, chunk in reports.chunks if chunk == 0][3:] == [
        *("recompute", "backward", "recompute", "recompute", "backward", "backward")
    ]
    assert [layer for phase, layer, chunk in reports.chunks if phase == "recompute" and chunk == 0] == [3, 1, 2]
