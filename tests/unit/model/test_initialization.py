from dataclasses import replace

import pytest
import torch

from megatron.core.parallel_state import ParallelState
from megatron.model.builder import build_model
from megatron.model.initialization import Initialization, Initializer
from tests.unit.model.small_model import OFFLOADED, ON_DEVICE, PLAIN, small_config, small_gpt_config

CONFIGS = pytest.mark.parametrize("config_of", [small_config, small_gpt_config], ids=["llama", "gpt"])


def initial(config, execution=PLAIN, dtype=torch.float32, seed=1234, vocab=32):
    model = build_model(config, vocab, ParallelState(), execution, Initialization(dtype, seed=seed))
    return {name: value.clone() for name, value in model.state_dict().items()}


@CONFIGS
def test_initial_values_do_not_depend_on_the_execution(config_of):
    want = initial(config_of())
    for execution in (ON_DEVICE, OFFLOADED, replace(PLAIN, activation_checkpointing=True)):
        got = initial(config_of(), execution)
        assert list(got) == list(want)
        assert all(torch.equal(got[name], want[name]) for name in want)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_starts_from_the_fp32_values_rounded(config_of, dtype):
    want, got = initial(config_of()), initial(config_of(), dtype=dtype)
    assert all(torch.equal(got[name], want[name].to(dtype)) for name in want)


@CONFIGS
def test_double_precision_starts_from_the_fp32_values(config_of):
    want, got = initial(config_of()), initial(config_of(), dtype=torch.float64)
    assert all(torch.equal(got[name], want[name].double()) for name in want)


def test_values_depend_on_the_seed_and_not_on_the_global_generator():
    config = small_config()
    torch.manual_seed(1)
    first = initial(config)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, third = initial(config), initial(config, seed=4321)
    assert torch.equal(torch.get_rng_state(), state)
    name = "layers.0.mlp.dense_h_to_4h.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], third[name])


@CONFIGS
def test_weights_start_with_the_standard_deviation_and_those_into_the_residual_stream_with_less(config_of):
    config = config_of(
        hidden_size=128, ffn_hidden_size=256, num_layers=8, init_method_std=0.05, kv_channels=32, num_attention_heads=4
    )
    for name, value in initial(config, vocab=512).items():
        if value.dim() == 1:
            expected = 1.0 if name.endswith("layernorm.weight") else 0.0
            assert (value == expected).all(), name
            continue
        into_residual = name.endswith(("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"))
        expected = 0.05 / 16**0.5 if into_residual else 0.05
        assert value.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(value.mean().item()) < 0.1 * expected, name


def test_no_two_weights_start_equal():
    values = [value for value in initial(small_config(num_layers=3)).values() if value.dim() == 2]
    assert len({tuple(value.flatten()[:4].tolist()) for value in values}) == len(values)


def test_an_initializer_draws_in_the_order_of_its_calls():
    def initializer():
        generator = torch.Generator().manual_seed(5)
        return Initializer(generator, torch.float32, torch.device("cpu"), std=0.1, residual_std=0.01)

    one, two = initializer(), initializer()
    expected = torch.empty(3, 4).normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one.normal(3, 4), expected)
    assert not torch.equal(one.normal(3, 4), expected)
    assert torch.equal(two.zeros(7), torch.zeros(7))
    torch.testing.assert_close(two.normal(3, 4, into_residual=True).detach(), expected / 10)
