from dataclasses import replace

import pytest
import torch

from megatron.core.parallel_state import ParallelState
from megatron.model.builder import Execution, StreamedExecution, build_execution
from megatron.model.plain import PlainExecution
from megatron.ops.attention import AttentionUnavailable
from tests.reference import reference_model
from tests.reference.compare import assert_gradients_equal
from tests.unit.model.small_model import (
    OFFLOADED,
    ON_DEVICE,
    PLAIN,
    VOCAB,
    assert_same_gradients,
    loss_and_gradients,
    small_config,
    small_gpt_config,
    small_inputs,
    small_model,
)

CONFIGS = pytest.mark.parametrize("config_of", [small_config, small_gpt_config], ids=["llama", "gpt"])
EXECUTIONS = pytest.mark.parametrize("execution", [PLAIN, ON_DEVICE, OFFLOADED], ids=["plain", "streamed", "offloaded"])


def layer_names(number, bias):
    parts = {
        "input_layernorm": bias,
        "self_attention.query_key_value": bias,
        "self_attention.dense": bias,
        "post_attention_layernorm": bias,
        "mlp.dense_h_to_4h": bias,
        "mlp.dense_4h_to_h": bias,
    }
    return [f"layers.{number}.{part}.{what}" for part in parts for what in ["weight", "bias"][: 1 + bias]]


def test_parameters_of_a_llama_are_named_in_the_order_of_the_computation():
    names = [name for name, _ in small_model(small_config()).named_parameters()]
    assert names == [
        "embedding.word_embeddings.weight",
        *layer_names(0, bias=False),
        *layer_names(1, bias=False),
        "head.final_layernorm.weight",
        "head.output_layer.weight",
    ]


def test_parameters_of_a_gpt_are_named_in_the_order_of_the_computation():
    names = [name for name, _ in small_model(small_gpt_config()).named_parameters()]
    assert names == [
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        *layer_names(0, bias=True),
        *layer_names(1, bias=True),
        "head.final_layernorm.weight",
        "head.final_layernorm.bias",
    ]


@CONFIGS
def test_names_and_shapes_are_the_same_for_every_execution_and_are_the_documented_ones(config_of):
    documented = reference_model.parameter_shapes(config_of(), VOCAB)
    for execution in (PLAIN, ON_DEVICE, OFFLOADED):
        state = small_model(config_of(), execution).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == documented


@EXECUTIONS
def test_a_tied_weight_is_one_parameter_with_the_gradients_of_both_uses(execution):
    config = small_gpt_config()
    model, inputs = small_model(config, execution), small_inputs(config)
    assert model.head.output_layer.weight is model.embedding.word_embeddings.weight
    untied = small_model(replace(config, untie_embeddings_and_output_weights=True), execution)
    untied.load_state_dict(model.state_dict())
    _, tied_gradients = loss_and_gradients(model, inputs)
    _, gradients = loss_and_gradients(untied, inputs)
    both = gradients["embedding.word_embeddings.weight"] + gradients["head.output_layer.weight"]
    torch.testing.assert_close(tied_gradients["embedding.word_embeddings.weight"], both, rtol=1e-12, atol=1e-13)


@EXECUTIONS
@CONFIGS
@pytest.mark.parametrize("kv_channels, percent, epsilon", [(6, 1.0, 1e-5), (16, 0.25, 0.1), (4, 0.5, 1e-12)])
def test_head_width_rotary_share_and_epsilon_reach_the_arithmetic(execution, config_of, kv_channels, percent, epsilon):
    config = config_of(
        kv_channels=kv_channels,
        rotary_percent=percent,
        use_rotary_position_embeddings=True,
        rotary_position_embeddings_theta=500.0,
        layernorm_epsilon=epsilon,
    )
    tokens, labels, mask, positions = small_inputs(config)
    loss, gradients = loss_and_gradients(small_model(config, execution), (tokens, labels, mask, positions))
    state = reference_model.random_state(config, VOCAB, seed=3)
    want = reference_model.loss_and_gradients(config, state, reference_model.Batch(tokens, labels, mask))
    torch.testing.assert_close(loss / mask.sum(), want.loss, rtol=1e-13, atol=0)
    got = {name: gradient / mask.sum().double() for name, gradient in gradients.items()}
    assert_gradients_equal(config, got, want.gradients, 1e-11)


@EXECUTIONS
def test_linear_scaling_of_rope_divides_the_positions(execution):
    scaled = small_config(rope_scaling_type="linear", rope_scaling_factor=4.0)
    tokens, labels, mask, positions = small_inputs(scaled)
    loss, gradients = loss_and_gradients(small_model(scaled, execution), (tokens, labels, mask, 4 * positions))
    plain_loss, plain = loss_and_gradients(small_model(small_config(), execution), (tokens, labels, mask, positions))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-13, atol=0)
    assert_same_gradients(gradients, plain, 1e-11)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3"])
def test_scaled_rope_is_the_same_in_chunks_and_another_than_without_scaling(kind):
    config = small_config(
        rope_scaling_type=kind, rope_scaling_factor=4.0, rope_scaling_original_max_position_embeddings=10
    )
    inputs = small_inputs(config)
    loss, gradients = loss_and_gradients(small_model(config, PLAIN), inputs)
    streamed_loss, streamed = loss_and_gradients(small_model(config, OFFLOADED), inputs)
    torch.testing.assert_close(streamed_loss, loss, rtol=1e-13, atol=0)
    assert_same_gradients(streamed, gradients, 1e-11)
    without, _ = loss_and_gradients(small_model(small_config(), PLAIN), inputs)
    assert not torch.allclose(loss, without, rtol=1e-5)


@EXECUTIONS
def test_the_model_gives_an_fp32_loss_and_gradients_of_its_own_dtype(execution):
    config = small_config()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loss, gradients = loss_and_gradients(small_model(config, execution, dtype), small_inputs(config))
        assert (loss.dtype, loss.shape) == (torch.float32, ())
        assert {gradient.dtype for gradient in gradients.values()} == {dtype}


@EXECUTIONS
def test_positions_are_those_given_and_not_the_places_in_memory(execution):
    """Attention with rotary positions sees distances: the same shift for all tokens changes nothing but rounding."""
    config = small_config()
    model, (tokens, labels, mask, positions) = small_model(config, execution), small_inputs(config)
    loss = model(tokens, labels, mask, positions)
    assert torch.allclose(model(tokens, labels, mask, positions + 1000), loss, rtol=1e-12)
    assert not torch.allclose(model(tokens, labels, mask, 2 * positions), loss, rtol=1e-6)


@EXECUTIONS
def test_the_loss_of_a_token_does_not_depend_on_later_tokens(execution):
    config = small_config()
    model, (tokens, labels, _, positions) = small_model(config, execution), small_inputs(config)
    mask = torch.zeros(2, config.seq_length)
    mask[:, :21] = 1
    changed = tokens.clone()
    changed[:, 21:] = (changed[:, 21:] + 1) % VOCAB
    with torch.no_grad():
        assert torch.equal(model(tokens, labels, mask, positions), model(changed, labels, mask, positions))
        assert not torch.equal(model(tokens, labels, mask + 1, positions), model(changed, labels, mask + 1, positions))


@EXECUTIONS
def test_sequences_of_a_batch_do_not_see_each_other(execution):
    config = small_config()
    model, inputs = small_model(config, execution), small_inputs(config, batch_size=3)
    with torch.no_grad():
        together = model(*inputs)
        alone = sum(model(*(t[b : b + 1] for t in inputs)) for b in range(3))
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=0)


@EXECUTIONS
@pytest.mark.parametrize("name", ["head.final_layernorm.weight", "embedding.word_embeddings.weight"])
def test_any_parameter_can_be_frozen(execution, name):
    config = small_config()
    model = small_model(config, execution)
    dict(model.named_parameters())[name].requires_grad_(False)
    _, gradients = loss_and_gradients(model, small_inputs(config))
    assert [n for n, gradient in gradients.items() if gradient is None] == [name]


def test_the_builder_alone_chooses_how_a_model_is_executed():
    config, cpu = small_config(), torch.device("cpu")
    plain = build_execution(config, ParallelState(), Execution(), torch.float32, cpu)
    streamed = build_execution(config, ParallelState(), Execution(fpdt=True, chunk_size=8), torch.float32, cpu)
    assert isinstance(plain, PlainExecution)
    assert isinstance(streamed, StreamedExecution)
    assert plain.stream.chunk_length == config.seq_length
    assert streamed.stream.chunk_length == 8


@pytest.mark.parametrize("fpdt, offloading, on_host", [(False, True, False), (True, False, False), (True, True, True)])
def test_the_residual_stream_is_on_the_host_only_when_a_stream_offloads(fpdt, offloading, on_host):
    execution = Execution(fpdt=fpdt, offloading=offloading)
    how = build_execution(small_config(), ParallelState(), execution, torch.float32, torch.device("cpu"))
    assert how.store.offloading == on_host


def test_a_backend_that_cannot_serve_is_refused_when_the_model_is_built():
    with pytest.raises(AttentionUnavailable, match="--attention-backend cudnn: it runs on CUDA devices"):
        small_model(small_config(attention_backend="cudnn"), PLAIN)
