from dataclasses import replace

import pytest

from megatron.config import Recompute
from megatron.config.model import ModelConfig
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.device_budget import DeviceBudget
from megatron.fpdt.stream import Saving
from megatron.planner.flops import (
    TrainingFlops,
    flops_of_checkpointing,
    flops_of_streaming,
    forward_flops,
    model_flops,
    throughput,
)

SIX_KEPT = SequenceLayout(10, 5)  # with slices of 2, which leave out the first of either chunk
LLAMA_3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    kv_channels=128,
    seq_length=8192,
    swiglu=True,
)
GPT_TINY = ModelConfig(
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    kv_channels=4,
    seq_length=10,
)


def saving(interval: int, recompute: Recompute, first_slices: float = 0.0) -> Saving:
    return Saving(recompute, interval, DeviceBudget(first_slices=first_slices))


def test_llama_3_8b_matches_a_count_by_hand():
    flops = forward_flops(LLAMA_3_8B, padded_vocab_size=128_256, seq_length=8192)
    query_and_output = 2 * 4096 * 4096
    key_and_value = 2 * 4096 * 1024
    mlp = 3 * 4096 * 14336
    assert flops.token_wise == 2 * 8192 * 32 * (query_and_output + key_and_value + mlp)
    assert flops.attention == 32 * 2 * 8192 * 8192 * 4096
    assert flops.head == 2 * 8192 * 4096 * 128_256


def test_llama_3_8b_dense_work_is_six_flops_per_token_and_weight():
    flops = forward_flops(LLAMA_3_8B, padded_vocab_size=128_256, seq_length=8192)
    weights_in_products = 8_030_261_248 - 128_256 * 4096 - (2 * 32 + 1) * 4096  # without input embedding and norms
    assert 3 * (flops.token_wise + flops.head) == 6 * 8192 * weights_in_products


def test_tiny_gpt_matches_a_count_by_hand():
    # per token: qkv 2*8*24 = 384, dense 2*8*8 = 128, mlp 2*2*8*32 = 1024; head 2*8*16 = 256
    # attention: 2 heads, 2 products of [10, 4] with [4, 10] at 800 FLOPs, halved = 1600
    assert model_flops(GPT_TINY, padded_vocab_size=16, seq_length=10) == 3 * (10 * (384 + 128 + 1024 + 256) + 1600)


def test_attention_is_counted_once_and_causally_at_a_million_tokens():
    flops = forward_flops(LLAMA_3_8B, padded_vocab_size=128_256, seq_length=2**20)
    full_square = 4 * 2**40 * 32 * 128 * 32
    assert flops.attention * 2 == full_square


def test_checkpointing_recomputes_every_layer():
    assert flops_of_checkpointing(GPT_TINY, 10) == 10 * (384 + 128 + 1024) + 1600
    assert flops_of_checkpointing(GPT_TINY, 10, attention_share=0.5) == 10 * (384 + 128 + 1024) + 800


def test_documents_leave_their_share_of_attention_and_all_of_the_rest():
    whole, half = (model_flops(GPT_TINY, 16, 10, share) for share in (1.0, 0.5))
    assert whole - half == 3 * 800


@pytest.mark.parametrize(
    "num_layers, interval, rebuilt", [(1, 1, 0), (4, 1, 0), (4, 2, 2), (5, 2, 2), (5, 4, 3), (3, 8, 2)]
)
def test_the_stream_recomputes_token_wise_work_except_the_last_product(num_layers, interval, rebuilt):
    model = replace(GPT_TINY, num_layers=num_layers)
    again = 384 + 128 + 512
    expected = 10 * (num_layers * again + rebuilt * (128 + 1024))
    assert flops_of_streaming(model, SIX_KEPT, 2, saving(interval, Recompute.ALL)) == expected


@pytest.mark.parametrize(
    "num_layers, interval, chains, rebuilt", [(1, 1, 1, 0), (4, 1, 4, 0), (4, 2, 2, 0), (7, 3, 3, 2), (8, 5, 2, 3)]
)
def test_recomputed_attention_leaves_out_what_the_highest_block_of_a_chain_does_not_need(
    num_layers, interval, chains, rebuilt
):
    model = replace(GPT_TINY, num_layers=num_layers)
    blocks = num_layers - chains
    forward = num_layers * (10 * 384 + 800) + blocks * 10 * (128 + 1024)
    keys_and_values = blocks * 5 * 384
    expected = forward + keys_and_values + 10 * (num_layers * (384 + 128 + 512) + rebuilt * (128 + 1024))
    assert (
        flops_of_streaming(model, SIX_KEPT, 2, saving(interval, Recompute.ATTENTION), attention_share=0.5) == expected
    )


@pytest.mark.parametrize(
    "recompute, again",
    [
        (Recompute.KV, 5 * 384 + 10 * (384 + 128 + 512)),
        (Recompute.ALL, 10 * (384 + 128 + 512)),
        (Recompute.MLP, 4 * 128 + 10 * 512),
        (Recompute.NONE, 4 * (128 + 512)),
    ],
)
def test_only_products_that_are_not_saved_of_six_tokens_in_ten_are_recomputed(recompute, again):
    model = replace(GPT_TINY, num_layers=3)
    assert flops_of_streaming(model, SIX_KEPT, 2, saving(1, recompute)) == 3 * again
    first_slices = 4 * (512 * (recompute.saves_mlp_products) + 128) if recompute.saves_products else 0
    assert flops_of_streaming(model, SIX_KEPT, 2, saving(1, recompute, first_slices=0.5)) == 3 * (
        again - first_slices // 2
    )


@pytest.mark.parametrize(
    "recompute, again",
    [
        (Recompute.KV, 5 * 384 + 10 * (384 + 512)),
        (Recompute.ALL, 10 * (384 + 512)),
        (Recompute.MLP, 10 * 512),
        (Recompute.NONE, 4 * 512),
    ],
)
def test_the_attention_product_of_a_parallel_residual_is_not_recomputed(recompute, again):
    model = replace(GPT_TINY, parallel_residual=True)
    assert flops_of_streaming(model, SIX_KEPT, 2, saving(1, recompute)) == again


def test_the_stream_leaves_out_a_third_of_swiglu():
    mlp = 2 * 8192 * 3 * 4096 * 14336 * 32
    token_wise = forward_flops(LLAMA_3_8B, 0, 8192).token_wise
    assert (
        flops_of_streaming(LLAMA_3_8B, SequenceLayout(8192, 8192), 8192, saving(1, Recompute.ALL))
        == token_wise - mlp // 3
    )


def test_throughput_divides_by_time_and_devices():
    report = throughput(
        tokens=80,
        seq_length=10,
        seconds=2.0,
        num_gpus=4,
        flops_per_sequence=TrainingFlops(model=100 * 10**12, hardware=120 * 10**12),
        peak_tflops=1000.0,
    )
    assert report.tokens_per_second_per_gpu == 10.0
    assert report.model_tflops_per_gpu == pytest.approx(100.0)
    assert (report.mfu, report.hfu) == pytest.approx((0.10, 0.12))


def test_an_unknown_peak_gives_no_utilisation():
    report = throughput(
        tokens=10,
        seq_length=10,
        seconds=1.0,
        num_gpus=1,
        flops_per_sequence=TrainingFlops(model=1, hardware=1),
        peak_tflops=None,
    )
    assert (report.mfu, report.hfu) == (None, None)
