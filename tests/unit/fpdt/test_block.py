import itertools
import weakref
from dataclasses import replace

import pytest
import torch

from megatron.config import Recompute
from megatron.fpdt.block import StreamedBlock
from megatron.fpdt.block_chain import BlockChain
from megatron.fpdt.seam import StreamedAttention
from megatron.fpdt.store import ChunkStore
from megatron.ops import linear as linear_module
from megatron.ops.attention import AttentionVariant
from megatron.ops.linear import linear
from tests.unit.model.small_model import (
    OFFLOADED,
    ON_DEVICE,
    PLAIN,
    Reports,
    assert_same_gradients,
    loss_and_gradients,
    relative_error,
    small_config,
    small_gpt_config,
    small_inputs,
    small_model,
)

LENGTH, BATCH, HIDDEN = 40, 2, 24
TIERS = pytest.mark.parametrize("execution", [ON_DEVICE, OFFLOADED], ids=["device", "host"])
CONFIGS = pytest.mark.parametrize("config_of", [small_config, small_gpt_config], ids=["llama", "gpt"])


def residual(dtype=torch.float64, seed=1):
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def on_tier(how, tensor):
    """The same numbers, stored on the store's tier."""
    resting = how.store.empty(tensor.shape, tensor.dtype)
    return resting.copy_(tensor)


def positions():
    return torch.arange(LENGTH).expand(BATCH, LENGTH)


def one_layer(execution, dtype=torch.float64, config_of=small_config, **changes):
    """(its way of being executed, the layer)"""
    model = small_model(config_of(LENGTH, num_layers=1, **changes), execution, dtype)
    return model.execution, model.layers[0]


def run_layer(execution, dy=None, dtype=torch.float64, slice_length=8192, config_of=small_config, **changes):
    """(y, {"x": dx, parameter: gradient})"""
    _, layer = one_layer(replace(execution, slice_length=slice_length), dtype, config_of, **changes)
    x = residual(dtype).requires_grad_()
    y = layer(x, positions())
    y.backward(residual(dtype, seed=2) if dy is None else dy)
    return y.detach().clone(), {"x": x.grad.clone(), **{name: p.grad for name, p in layer.named_parameters()}}


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
    saved = y.grad_fn.block.saved
    read = [x, y, dy, *saved.o_cBHD, *saved.lse_BHC, *saved.kv_CBKD, *layer.parameters()]
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


@TIERS
def test_evaluation_saves_nothing_but_the_residual_stream(execution):
    how, layer = one_layer(execution)
    pool = how.store.pool
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(residual(), positions())
        assert y.grad_fn is None
        assert pool.used_bytes == (y.nbytes if execution.offloading else 0)
        del y
        assert pool.used_bytes == 0


def test_evaluation_stores_keys_and_values_and_outputs_only():
    how, layer = one_layer(OFFLOADED)
    with torch.no_grad():
        y = layer(residual(), positions())
    key_value_bytes = LENGTH * BATCH * 2 * (2 * 8) * 8
    assert how.store.copied.bytes_out == y.nbytes + key_value_bytes
    assert how.store.pool.peak_used_bytes == y.nbytes + key_value_bytes


def test_a_bf16_step_copies_what_the_schedule_says():
    """Chunks of 16, 16 and 8 tokens; gradients of keys and values travel in fp32."""
    how, layer = one_layer(OFFLOADED, torch.bfloat16)
    copied = how.store.copied
    per_token = {"x": 2 * HIDDEN, "o": 2 * 4 * 8, "lse": 4 * 4, "kv": 2 * 2 * 2 * 8, "dkv": 4 * 2 * 2 * 8}
    x, o, lse, kv, dkv = (BATCH * num_bytes for num_bytes in per_token.values())
    below_diagonal = 16 + (16 + 16)  # key tokens of rows 1 and 2
    stored = loaded = 16  # key tokens of tile (2, 0), and of (1, 0): those of (2, 1) and (1, 0) stay for the diagonals
    y = layer(on_tier(how, residual(torch.bfloat16)).requires_grad_(), positions())
    assert copied.bytes_out == LENGTH * (x + kv + o + lse)
    assert copied.bytes_in == (LENGTH + 16) * x + below_diagonal * kv, "the block above begins with the first 16 of y"
    copied.bytes_in = copied.bytes_out = 0
    y.backward(on_tier(how, residual(torch.bfloat16, seed=2)))
    assert copied.bytes_out == LENGTH * x + stored * dkv
    assert copied.bytes_in == LENGTH * (2 * x + o + lse) + below_diagonal * kv + loaded * dkv


def test_evaluation_gives_the_bits_of_training_without_dropout():
    _, layer = one_layer(OFFLOADED)
    trained = layer(residual().requires_grad_(), positions())
    with torch.no_grad():
        assert torch.equal(layer(residual(), positions()), trained)


def test_the_backward_pass_releases_all_host_memory_and_later_steps_allocate_none():
    config = small_config(LENGTH)
    model, inputs = small_model(config, OFFLOADED), small_inputs(config)
    pool = model.execution.store.pool
    model(*inputs).backward()
    after_one_step = pool.allocated_bytes
    assert pool.used_bytes == 0
    assert after_one_step == pool.peak_used_bytes
    for _ in range(3):
        model(*inputs).backward()
        assert (pool.used_bytes, pool.allocated_bytes) == (0, after_one_step)


def test_a_forward_pass_without_a_backward_pass_releases_its_host_memory():
    how, layer = one_layer(OFFLOADED)
    y = layer(residual().requires_grad_(), positions())
    assert how.store.pool.used_bytes > y.nbytes
    del y
    assert how.store.pool.used_bytes == 0


def test_work_that_fails_half_way_releases_its_host_memory(monkeypatch):
    how, layer = one_layer(OFFLOADED)
    calls, mlp = itertools.count(), layer.mlp.forward

    def failing_mlp(x):
        if next(calls) == 2:  # after the trace and the first chunk
            raise ValueError("half way")
        return mlp(x)

    monkeypatch.setattr(layer.mlp, "forward", failing_mlp)
    with pytest.raises(ValueError, match="half way"):
        layer(residual().requires_grad_(), positions())
    assert how.store.pool.used_bytes == 0
    assert torch.is_grad_enabled()


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


class OneFactor(torch.nn.Module):
    """A layer whose queries, keys and values share memory, and of whose parameters one takes no part."""

    layer_number, uses_dropout = 1, False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((HIDDEN,), 0.5, dtype=torch.float64))
        self.idle = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.core_attention = StreamedAttention()

    def forward(self, x_SBh, positions_BS):
        q = (x_SBh * self.weight).unflatten(2, (3, 8))
        return x_SBh + self.core_attention(q, q[:, :, :2], AttentionVariant(0.5), 0.0, None).flatten(2)


class SharedNorm(OneFactor):
    """A layer whose MLP reads what its attention reads."""

    def forward(self, x_SBh, positions_BS):
        normed = x_SBh * self.weight
        q = torch.nn.functional.layer_norm(normed, (HIDDEN,)).unflatten(2, (3, 8))
        return self.core_attention(q, q[:, :, :2], AttentionVariant(0.5), 0.0, None).flatten(2) + q.flatten(2).tanh()


class GatedAttention(OneFactor):
    """A layer whose attention output is gated by the product from which the queries are computed."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.eye(HIDDEN, dtype=torch.float64) + 0.1)

    def forward(self, x_SBh, positions_BS):
        product = linear(x_SBh * self.weight, self.matrix, None)
        q = product.unflatten(2, (3, 8))
        o = self.core_attention(q, q[:, :, :2], AttentionVariant(0.5), 0.0, None)
        return x_SBh + o.flatten(2) * product.sigmoid()


@TIERS
@pytest.mark.parametrize("kind", [OneFactor, SharedNorm, GatedAttention])
@pytest.mark.parametrize("slice_length", [5, 16])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_any_module_that_calls_attention_once_can_be_streamed(execution, kind, slice_length, recompute):
    stream = one_layer(replace(execution, recompute=recompute, slice_length=slice_length))[0].stream
    layer, x = kind(), residual().requires_grad_()
    StreamedBlock(stream, layer, BlockChain(stream))(x, positions()).backward(residual(seed=2))
    leaf, want = residual().requires_grad_(), kind()
    want.core_attention = plain_attention
    want(leaf, positions()).backward(residual(seed=2))
    assert layer.idle.grad is None
    assert relative_error(x.grad, leaf.grad) < 1e-13
    wanted = {name: p.grad for name, p in want.named_parameters()}
    assert_same_gradients({name: p.grad for name, p in layer.named_parameters()}, wanted, 1e-13)


def plain_attention(q, kv, variant, dropout, documents):
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, *(t.expand(-1, -1, q.shape[2], -1) for t in kv.chunk(2, 2))))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=variant.scale)
    return o.permute(2, 0, 1, 3)


class Twice(OneFactor):
    def forward(self, x_SBh, positions_BS):
        return super().forward(super().forward(x_SBh, positions_BS), positions_BS)


class Never(OneFactor):
    def forward(self, x_SBh, positions_BS):
        return x_SBh * self.weight


@pytest.mark.parametrize("kind, times", [(Twice, "2 times"), (Never, "0 times")])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_does_not_call_attention_once_is_refused(kind, times, training):
    stream = one_layer(ON_DEVICE)[0].stream
    message = f"called its attention {times}" if training else "the layer has (not )?called its attention"
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match=message):
        StreamedBlock(stream, kind(), BlockChain(stream))(residual(), positions())
    assert torch.is_grad_enabled()


def arrivals_alive(monkeypatch):
    """Peak number of arrived (or arriving) device tensors alive at once, by shape and dtype."""
    alive, peak, start = {}, {}, ChunkStore._start

    def forget(key):
        alive[key] -= 1

    def watched(self, chunk):
        arriving, event = start(self, chunk)
        key = (tuple(arriving.shape), arriving.dtype)
        alive[key] = alive.get(key, 0) + 1
        peak[key] = max(peak.get(key, 0), alive[key])
        weakref.finalize(arriving.untyped_storage(), forget, key)
        return arriving, event

    monkeypatch.setattr(ChunkStore, "_start", watched)
    return peak


def peaks_of_both_passes(monkeypatch):
    """Peaks of the forward and of the backward pass. In bf16 the fp32 gradients are told apart from keys and values."""
    how, layer = one_layer(replace(OFFLOADED, chunk_size=4), torch.bfloat16, num_attention_heads=6)
    peak = arrivals_alive(monkeypatch)
    y = layer(on_tier(how, residual(torch.bfloat16)).requires_grad_(), positions())
    forward = dict(peak)
    peak.clear()
    y.backward(on_tier(how, residual(torch.bfloat16, seed=2)))
    return forward, peak


KEY_VALUE_CHUNK, RESIDUAL_CHUNK = (4, BATCH, 2 * 2, 8), (4, BATCH, HIDDEN)


def test_at_most_two_chunks_of_keys_and_values_and_of_their_gradients_are_on_the_device(monkeypatch):
    """One in use, one on its way."""
    forward, backward = peaks_of_both_passes(monkeypatch)
    assert forward[KEY_VALUE_CHUNK, torch.bfloat16] <= 2
    assert backward[KEY_VALUE_CHUNK, torch.bfloat16] <= 2
    assert backward[KEY_VALUE_CHUNK, torch.float32] <= 2


def test_at_most_two_chunks_of_the_residual_stream_are_on_the_device(monkeypatch):
    """One in use, one on its way; in the backward pass of the block's input and of its output's gradient."""
    forward, backward = peaks_of_both_passes(monkeypatch)
    assert forward[RESIDUAL_CHUNK, torch.bfloat16] <= 2
    assert backward[RESIDUAL_CHUNK, torch.bfloat16] <= 4


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


@pytest.mark.parametrize("budget", [0, 20_000, 60_000, 10**9])
def test_a_device_budget_moves_chunks_and_changes_no_bit(budget):
    """Some tensors are stored on the device and some on the host, the input and its gradient among them."""
    results = []
    for execution in (OFFLOADED, replace(OFFLOADED, device_memory_bytes=budget)):
        how, layer = one_layer(execution)
        x = on_tier(how, residual()).requires_grad_()
        y = layer(x, positions())
        y.backward(on_tier(how, residual(seed=2)))
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        assert how.store.device_bytes <= budget + x.grad.nbytes or execution is OFFLOADED
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@TIERS
def test_inputs_rebuilt_from_attention_outputs_change_no_bit(execution, interval, dropout):
    config = small_config(LENGTH, num_layers=5, hidden_dropout=dropout)
    inputs = small_inputs(config)
    results = []
    for each in (execution, replace(execution, checkpoint_interval=interval)):
        model = small_model(config, each)
        torch.manual_seed(7)
        results.append(loss_and_gradients(model, inputs))
    (loss, gradients), (other_loss, others) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@TIERS
@CONFIGS
@pytest.mark.parametrize("recompute", [Recompute.KV, Recompute.MLP, Recompute.NONE])
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
    "recompute, products",
    [(Recompute.KV, 8 + 10 + 10 + 10), (Recompute.ALL, 10 + 10 + 10), (Recompute.MLP, 3 + 10), (Recompute.NONE, 3 + 3)],
)
@TIERS
def test_only_the_chosen_products_are_recomputed(execution, recompute, products, monkeypatch):
    _, layer = one_layer(replace(execution, recompute=recompute, slice_length=4))
    y = layer(residual().requires_grad_(), positions())
    computed = []
    product = linear_module.F.linear
    monkeypatch.setattr(linear_module.F, "linear", lambda *args: computed.append(args) or product(*args))
    y.backward(residual(seed=2))
    assert len(computed) == products


def test_without_gradients_no_product_is_saved():
    how, layer = one_layer(replace(OFFLOADED, recompute=Recompute.NONE))
    with torch.no_grad():
        y = layer(residual(), positions())
    keys_and_values = LENGTH * BATCH * 2 * 2 * 8 * y.element_size()
    assert how.store.pool.peak_used_bytes == y.nbytes + keys_and_values


def test_two_forward_passes_before_their_backward_passes_do_not_share_a_chain():
    config = small_config(LENGTH, num_layers=3)
    first, second = small_inputs(config), tuple(t.flip(0).contiguous() for t in small_inputs(config))
    gradients = []
    for interval in (1, 2):
        model = small_model(config, replace(OFFLOADED, checkpoint_interval=interval))
        losses = [model(*inputs) for inputs in (first, second)]
        for loss in losses:
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
