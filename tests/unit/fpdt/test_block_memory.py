"""Memory of a streamed block: what is stored where, what is copied, and when it is released."""

import itertools
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron.config import Recompute
from megatron.fpdt.device_budget import DeviceBudget
from megatron.fpdt.disk_budget import DiskBudget
from megatron.fpdt.seam import SuspendedLayer
from megatron.fpdt.store import ChunkStore
from tests.unit.fpdt.one_block import (
    BATCH,
    HIDDEN,
    LENGTH,
    TIERS,
    on_tier,
    one_layer,
    positions,
    residual,
)
from tests.unit.model.small_model import (
    OFFLOADED,
    small_config,
    small_inputs,
    small_model,
)


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
    key_value_bytes = (LENGTH - 8) * BATCH * 2 * (2 * 8) * 8  # without the last chunk, which only its own row reads
    assert how.store.copied.bytes_out == y.nbytes + key_value_bytes
    assert how.store.pool.peak_used_bytes == y.nbytes + key_value_bytes


def test_a_bf16_step_copies_what_the_schedule_says():
    """Chunks of 16, 16 and 8 tokens; gradients of keys and values travel in fp32."""
    how, layer = one_layer(OFFLOADED, torch.bfloat16)
    copied = how.store.copied
    per_token = {"x": 2 * HIDDEN, "o": 2 * 4 * 8, "lse": 4 * 4, "kv": 2 * 2 * 2 * 8, "dkv": 4 * 2 * 2 * 8}
    x, o, lse, kv, dkv = (BATCH * num_bytes for num_bytes in per_token.values())
    below_diagonal = 16 + (16 + 16)  # key tokens of rows 1 and 2
    last = 8  # whose keys are those of no tile but its own
    stored = loaded = 16  # key tokens of tile (2, 0), and of (1, 0): those of (2, 1) and (1, 0) stay for the diagonals
    y = layer(on_tier(how, residual(torch.bfloat16)).requires_grad_(), positions())
    assert copied.bytes_out == LENGTH * (x + kv + o + lse) - last * kv
    assert copied.bytes_in == (LENGTH + 16) * x + below_diagonal * kv, "the block above begins with the first 16 of y"
    copied.bytes_in = copied.bytes_out = 0
    y.backward(on_tier(how, residual(torch.bfloat16, seed=2)))
    assert copied.bytes_out == LENGTH * x + stored * dkv
    assert copied.bytes_in == LENGTH * (2 * x + o + lse) + below_diagonal * kv + loaded * dkv


@pytest.mark.parametrize(
    "limits, loaded_kv, stored_dkv",
    [
        ({"window": 1}, 0, 0),
        ({"window": 9}, 2, 0),
        ({"window": 18}, 3, 1),
        ({"window": 40}, 3, 1),
        ({"local_block": 16}, 0, 0),
    ],
    ids=str,
)
def test_a_window_copies_the_chunks_of_the_tiles_that_it_leaves(limits, loaded_kv, stored_dkv):
    """Chunks of 16, 16 and 8 tokens; what no tile loads is not stored."""
    how, layer = one_layer(OFFLOADED)
    layer.self_attention.variant = replace(layer.self_attention.variant, **limits)
    copied, chunk = how.store.copied, 16 * BATCH
    x, o, lse, kv = HIDDEN * 8, 4 * 8 * 8, 4 * 8, 2 * 2 * 8 * 8
    y = layer(on_tier(how, residual()).requires_grad_(), positions())
    assert copied.bytes_out == LENGTH * BATCH * (x + o + lse) + min(loaded_kv, 2) * chunk * kv
    assert copied.bytes_in == (LENGTH * BATCH + chunk) * x + loaded_kv * chunk * kv
    copied.bytes_in = copied.bytes_out = 0
    y.backward(on_tier(how, residual(seed=2)))
    assert copied.bytes_out == LENGTH * BATCH * x + stored_dkv * chunk * kv
    assert copied.bytes_in == LENGTH * BATCH * (2 * x + o + lse) + (loaded_kv + stored_dkv) * chunk * kv


ATTENTION_RECOMPUTED = replace(OFFLOADED, recompute=Recompute.ATTENTION, checkpoint_interval=5)


@pytest.mark.parametrize("execution", [OFFLOADED, ATTENTION_RECOMPUTED], ids=["all", "attention"])
@pytest.mark.parametrize("num_layers", [2, 7])
def test_the_backward_pass_releases_all_host_memory_and_later_steps_allocate_none(execution, num_layers):
    config = small_config(LENGTH, num_layers=num_layers)
    model, inputs = small_model(config, execution), small_inputs(config)
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


@pytest.mark.parametrize("calls_before", [0, 2, 5])
def test_a_recomputed_forward_pass_that_fails_half_way_leaves_nothing_suspended(monkeypatch, calls_before):
    """Three chunks of the first block are recomputed, then three of the second up to its attention output."""
    config = small_config(LENGTH, num_layers=2)
    model, inputs = small_model(config, ATTENTION_RECOMPUTED), small_inputs(config)
    loss = model(*inputs)
    started, calls = watch_suspended(monkeypatch), itertools.count()

    def failing(norm, x):
        if next(calls) == calls_before:
            raise ValueError("half way")
        return norm(x)

    for layer in model.layers:
        norm = layer.input_layernorm
        monkeypatch.setattr(norm, "forward", partial(failing, norm.forward))
    with pytest.raises(ValueError, match="half way"):
        loss.backward()
    del loss
    assert all(each._greenlet.dead for each in started)
    assert model.execution.store.pool.used_bytes == 0
    assert torch.is_grad_enabled()


def watch_suspended(monkeypatch):
    """Return the list to which layers that are started are added."""
    started, start = [], SuspendedLayer.__init__

    def watched(self, *args):
        start(self, *args)
        started.append(self)

    monkeypatch.setattr(SuspendedLayer, "__init__", watched)
    return started


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


@pytest.mark.parametrize("budget", [0, 20_000, 60_000, 10**9])
def test_a_device_budget_moves_chunks_and_changes_no_bit(budget):
    """Some tensors are stored on the device and some on the host, the input and its gradient among them."""
    results = []
    for execution in (OFFLOADED, replace(OFFLOADED, device_budget=DeviceBudget(budget))):
        how, layer = one_layer(execution)
        x = on_tier(how, residual()).requires_grad_()
        y = layer(x, positions())
        y.backward(on_tier(how, residual(seed=2)))
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        assert how.store.device_tier.used_bytes <= budget + x.grad.nbytes or execution is OFFLOADED
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("recompute, interval", [(Recompute.ATTENTION, 3), (Recompute.KV, 2), (Recompute.NONE, 1)])
@pytest.mark.parametrize("host_bytes, share", [(0, 1.0), (100_000, 0.5), (10**9, 0.2)])
def test_a_disk_changes_no_bit_and_is_empty_after_a_step(tmp_path, host_bytes, share, recompute, interval):
    config, results = small_config(LENGTH, num_layers=3), []
    saving = replace(OFFLOADED, recompute=recompute, checkpoint_interval=interval, slice_length=6)
    budget = DiskBudget((str(tmp_path),), 2**24, 0, share)
    for execution in (saving, replace(saving, host_memory_bytes=host_bytes, disk=budget)):
        model = small_model(config, execution)
        for _ in range(2):
            loss = model(*small_inputs(config, BATCH))
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
    with torch.inference_mode():
        assert torch.equal(model(*small_inputs(config, BATCH)), results[0][0])
    assert all(torch.equal(*each) for others in results[1:] for each in zip(results[0], others, strict=True))
    store = model.execution.store
    assert store.pool.allocated_bytes <= host_bytes
    assert store.disk_tier.copied.bytes_out > 0
    assert (store.disk_tier.used_bytes, store.pool.used_bytes) == (0, 0)


def test_without_gradients_no_product_is_saved():
    how, layer = one_layer(replace(OFFLOADED, recompute=Recompute.NONE))
    with torch.no_grad():
        y = layer(residual(), positions())
    keys_and_values = (LENGTH - 8) * BATCH * 2 * 2 * 8 * y.element_size()
    assert how.store.pool.peak_used_bytes == y.nbytes + keys_and_values
