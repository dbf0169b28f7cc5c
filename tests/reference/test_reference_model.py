"""The reference against Hugging Face's models, finite differences and its own definition of names."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_gradients_equal
from tests.reference.reference_model import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    Batch,
    State,
    loss_and_gradients,
    parameter_shapes,
    random_state,
)

VOCAB = 40


@dataclass(frozen=True)
class Shape:
    num_layers: int = 2
    hidden_size: int = 32
    ffn_hidden_size: int | None = 48
    num_attention_heads: int = 4
    num_key_value_heads: int | None = 2
    kv_channels: int | None = None
    max_position_embeddings: int | None = 64
    use_rotary_position_embeddings: bool = True
    rotary_percent: float = 1.0
    rotary_position_embeddings_theta: float = 10000.0
    normalization: str = "rmsnorm"
    layernorm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    swiglu: bool = True
    openai_gelu: bool = False
    parallel_residual: bool = False
    disable_bias_linear: bool = True
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = True


LLAMA = Shape()
GPT = Shape(
    num_key_value_heads=4,
    use_rotary_position_embeddings=False,
    normalization="layernorm",
    swiglu=False,
    openai_gelu=True,
    disable_bias_linear=False,
    untie_embeddings_and_output_weights=False,
)
NEOX = replace(
    GPT,
    num_attention_heads=2,
    num_key_value_heads=2,
    use_rotary_position_embeddings=True,
    rotary_percent=0.25,
    openai_gelu=False,
    untie_embeddings_and_output_weights=True,
)


def random_batch(seed: int = 0, sequence: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, VOCAB, (2, 2, sequence), generator=generator)
    return Batch(tokens, labels, (torch.rand(2, sequence, generator=generator) < 0.7).double())


def hugging_face_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.tokens).logits
    token_loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    return (token_loss * batch.loss_mask).sum() / batch.loss_mask.sum()


def randomise(model: torch.nn.Module) -> None:
    """Move every parameter away from its initial value: zero biases and unit norms would hide faults."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)


def check_against(model: torch.nn.Module, shape: Shape, translate: Callable[[State], State], tolerance: float) -> None:
    """Compare loss and gradients; `translate` takes tensors by Hugging Face name to tensors by ours (it is linear)."""
    batch = random_batch()
    randomise(model)
    loss = hugging_face_loss(model, batch)
    loss.backward()
    parameters = dict(model.named_parameters())
    state = translate({name: parameter.detach() for name, parameter in parameters.items()})
    gradients = translate({name: parameter.grad for name, parameter in parameters.items()})

    result = loss_and_gradients(shape, state, batch)
    assert abs(float(result.loss - loss.detach())) < tolerance * float(result.loss)
    assert_gradients_equal(shape, gradients, result.gradients, tolerance)


def llama_names(shape: Shape, source: State) -> State:
    target = {
        WORD_EMBEDDINGS: source["model.embed_tokens.weight"],
        "head.final_layernorm.weight": source["model.norm.weight"],
        OUTPUT_LAYER: source["lm_head.weight"],
    }
    groups, size = shape.num_key_value_heads, shape.hidden_size // shape.num_attention_heads
    for layer in range(shape.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        for kind in ["weight", "bias"][: 1 + shape.add_qkv_bias]:
            parts = (source[f"{theirs}.self_attn.{x}_proj.{kind}"] for x in "qkv")
            q, k, v = (part.unflatten(0, (groups, -1, size)) for part in parts)
            target[f"{ours}.self_attention.query_key_value.{kind}"] = torch.cat([q, k, v], dim=1).flatten(0, 2)
        for kind in ["q", "k"] if shape.qk_layernorm else []:
            norm = source[f"{theirs}.self_attn.{kind}_norm.weight"]
            target[f"{ours}.self_attention.{kind}_layernorm.weight"] = norm
        gate, up = (source[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        target |= {
            f"{ours}.input_layernorm.weight": source[f"{theirs}.input_layernorm.weight"],
            f"{ours}.post_attention_layernorm.weight": source[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.self_attention.dense.weight": source[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.mlp.dense_h_to_4h.weight": torch.cat([gate, up]),
            f"{ours}.mlp.dense_4h_to_h.weight": source[f"{theirs}.mlp.down_proj.weight"],
        }
    return target


def gpt2_names(shape: Shape, source: State) -> State:
    target = {
        WORD_EMBEDDINGS: source["transformer.wte.weight"],
        "embedding.position_embeddings.weight": source["transformer.wpe.weight"],
        "head.final_layernorm.weight": source["transformer.ln_f.weight"],
        "head.final_layernorm.bias": source["transformer.ln_f.bias"],
    }
    names = {
        "ln_1": "input_layernorm",
        "attn.c_attn": "self_attention.query_key_value",
        "attn.c_proj": "self_attention.dense",
        "ln_2": "post_attention_layernorm",
        "mlp.c_fc": "mlp.dense_h_to_4h",
        "mlp.c_proj": "mlp.dense_4h_to_h",
    }
    for layer in range(shape.num_layers):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                tensor = source[f"transformer.h.{layer}.{theirs}.{kind}"]
                tensor = tensor.T if tensor.dim() == 2 else tensor
                if theirs == "attn.c_attn":  # rows [q, k, v][head][D] -> [head][q, k, v][D]
                    tensor = tensor.unflatten(0, (3, shape.num_attention_heads, -1)).transpose(0, 1).flatten(0, 2)
                target[f"layers.{layer}.{ours}.{kind}"] = tensor
    return target


def neox_names(source: State) -> State:
    renames = {
        "gpt_neox.embed_in.": "embedding.word_embeddings.",
        "gpt_neox.final_layer_norm.": "head.final_layernorm.",
        "lm_head.": "head.output_layer.",
        "embed_out.": "head.output_layer.",
        "gpt_neox.layers.": "layers.",
        ".attention.": ".self_attention.",
    }
    target = {}
    for name, tensor in source.items():
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        target[name] = tensor
    return target


@pytest.mark.parametrize(
    "family, shape",
    [
        ("Llama", LLAMA),
        ("Qwen2", replace(LLAMA, add_qkv_bias=True)),
        ("Qwen3", replace(LLAMA, qk_layernorm=True)),
    ],
)
def test_llama_and_its_kin_with_grouped_queries_agree_with_hugging_face(family: str, shape: Shape) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        head_dim=8,
        attn_implementation="eager",
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).double()
    # Hugging Face's RMSNorm, softmax and angles are float32 whatever the model's type: that sets the tolerance.
    check_against(model, shape, lambda source: llama_names(shape, source), tolerance=2e-6)


def test_gpt_with_learned_positions_agrees_with_hugging_face_to_float64() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config).double()
    check_against(model, GPT, lambda source: gpt2_names(GPT, source), tolerance=1e-12)


@pytest.mark.parametrize("parallel", [False, True])
def test_partial_rotary_positions_and_parallel_residuals_agree_with_hugging_face(parallel: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        rotary_pct=0.25,
        hidden_act="gelu",
        use_parallel_residual=parallel,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.GPTNeoXForCausalLM(config).double()
    check_against(model, replace(NEOX, parallel_residual=parallel), neox_names, tolerance=2e-6)


@pytest.mark.parametrize("shape", [LLAMA, GPT, replace(LLAMA, kv_channels=16, num_key_value_heads=1)])
def test_gradients_agree_with_finite_differences(shape: Shape) -> None:
    state, batch, step = random_state(shape, VOCAB, seed=1), random_batch(), 1e-5
    direction = random_state(shape, VOCAB, seed=2)

    def loss_at(distance: float) -> float:
        moved = {name: state[name] + distance * direction[name] for name in state}
        return float(loss_and_gradients(shape, moved, batch).loss)

    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    gradients = loss_and_gradients(shape, state, batch).gradients
    assert slope == pytest.approx(sum(float((gradients[n] * direction[n]).sum()) for n in gradients), rel=1e-6)


def test_masked_tokens_do_not_touch_loss_or_gradients() -> None:
    state, batch = random_state(LLAMA, VOCAB, seed=1), random_batch()
    other_labels = torch.where(batch.loss_mask > 0, batch.labels, (batch.labels + 1) % VOCAB)
    first = loss_and_gradients(LLAMA, state, batch)
    second = loss_and_gradients(LLAMA, state, replace(batch, labels=other_labels))
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)


def test_tied_output_layer_has_one_gradient_under_the_embedding_name() -> None:
    result = loss_and_gradients(GPT, random_state(GPT, VOCAB, seed=1), random_batch())
    assert WORD_EMBEDDINGS in result.gradients
    assert OUTPUT_LAYER not in result.gradients
    assert OUTPUT_LAYER in parameter_shapes(GPT, VOCAB)
