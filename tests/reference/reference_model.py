"""The decoder-only model written as plainly as it can be: one process, the whole sequence, float64, autograd.

Everything is materialised (scores, logits) and nothing is shared with the package under test, so that agreement means
something. The weights come in under the names and layouts of the package's state_dict:

    embedding.word_embeddings.weight          [V, h]      V is the padded vocabulary
    embedding.position_embeddings.weight      [max_pos, h]            without rotary positions
    layers.N.input_layernorm.{weight,bias}    [h]                     no bias under rmsnorm
    layers.N.self_attention.query_key_value.* [groups * (queries per group + 2) * head_dim, h]
                                              rows: group, then its query heads, its key, its value
    layers.N.self_attention.{q,k}_layernorm.* [head_dim]              under qk_layernorm, over each head before RoPE
    layers.N.self_attention.sinks             [heads]    if given: a score that joins the softmax of every query
    layers.N.self_attention.dense.*           [h, heads * head_dim]
    layers.N.post_attention_layernorm.*       [h]
    layers.N.mlp.dense_h_to_4h.*              [ffn, h], or [2 ffn, h] under swiglu: gate rows, then up rows
    layers.N.mlp.dense_4h_to_h.*              [h, ffn]
    head.final_layernorm.*                    [h]
    head.output_layer.weight                  [V, h]      the word embeddings themselves when tied

Legend: B batch, S sequence, h hidden, G key/value groups, R query heads per group, D head size, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
OUTPUT_LAYER = "head.output_layer.weight"


class Architecture(Protocol):
    """What the reference reads of a model configuration; the package's ModelConfig has all of it."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int | None: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int | None: ...
    @property
    def kv_channels(self) -> int | None: ...
    @property
    def max_position_embeddings(self) -> int | None: ...
    @property
    def use_rotary_position_embeddings(self) -> bool: ...
    @property
    def rotary_percent(self) -> float: ...
    @property
    def rotary_position_embeddings_theta(self) -> float: ...
    @property
    def normalization(self) -> str: ...
    @property
    def layernorm_epsilon(self) -> float: ...
    @property
    def qk_layernorm(self) -> bool: ...
    @property
    def swiglu(self) -> bool: ...
    @property
    def openai_gelu(self) -> bool: ...
    @property
    def parallel_residual(self) -> bool: ...
    @property
    def disable_bias_linear(self) -> bool: ...
    @property
    def add_qkv_bias(self) -> bool: ...
    @property
    def untie_embeddings_and_output_weights(self) -> bool: ...


@dataclass(frozen=True)
class Batch:
    """A whole batch: tokens, labels [B, S] int64, loss_mask [B, S] float, positions 0..S-1 understood.

    `visible` has a mask [B, S, S] for each layer: the keys that a query sees. Without, attention is causal. A query
    that sees none has the output zero.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    visible: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Result:
    """The mean loss over unmasked tokens, [] float64, and its gradient for every parameter by name."""

    loss: Tensor
    gradients: State


def head_size(config: Architecture) -> int:
    return config.kv_channels or config.hidden_size // config.num_attention_heads


def group_count(config: Architecture) -> int:
    return config.num_key_value_heads or config.num_attention_heads


def parameter_shapes(config: Architecture, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every entry of the state_dict; a tied output layer appears under both names."""
    h, attention = config.hidden_size, config.num_attention_heads * head_size(config)
    ffn = config.ffn_hidden_size or 4 * h
    qkv = attention + 2 * group_count(config) * head_size(config)
    shapes: dict[str, tuple[int, ...]] = {WORD_EMBEDDINGS: (padded_vocab_size, h)}

    def norm(name: str, size: int = h) -> None:
        shapes[f"{name}.weight"] = (size,)
        if config.normalization == "layernorm":
            shapes[f"{name}.bias"] = (size,)

    def linear(name: str, rows: int, columns: int, has_bias: bool = not config.disable_bias_linear) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)

    if not config.use_rotary_position_embeddings:
        assert config.max_position_embeddings is not None
        shapes[POSITION_EMBEDDINGS] = (config.max_position_embeddings, h)
    for layer in range(config.num_layers):
        norm(f"layers.{layer}.input_layernorm")
        has_bias = config.add_qkv_bias or not config.disable_bias_linear
        linear(f"layers.{layer}.self_attention.query_key_value", qkv, h, has_bias)
        for kind in ["q", "k"] if config.qk_layernorm else []:
            norm(f"layers.{layer}.self_attention.{kind}_layernorm", head_size(config))
        linear(f"layers.{layer}.self_attention.dense", h, attention)
        norm(f"layers.{layer}.post_attention_layernorm")
        linear(f"layers.{layer}.mlp.dense_h_to_4h", ffn * (2 if config.swiglu else 1), h)
        linear(f"layers.{layer}.mlp.dense_4h_to_h", h, ffn)
    norm("head.final_layernorm")
    shapes[OUTPUT_LAYER] = (padded_vocab_size, h)
    return shapes


def random_state(config: Architecture, padded_vocab_size: int, seed: int) -> State:
    """Draw float64 weights in which nothing is zero or one: biases and norm weights are random like the rest."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in parameter_shapes(config, padded_vocab_size).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = 1.0 / math.sqrt(shape[-1]) if len(shape) == 2 and not name.startswith("embedding") else 0.3
        offset = 1.0 if name.endswith("layernorm.weight") else 0.0
        state[name] = offset + scale * noise
    if not config.untie_embeddings_and_output_weights:
        state[OUTPUT_LAYER] = state[WORD_EMBEDDINGS]
    return state


def loss_and_gradients(config: Architecture, state: Mapping[str, Tensor], batch: Batch) -> Result:
    """Return the mean token loss and all its gradients; a tied output layer's gradient is the word embeddings'."""
    weights = {name: weight.detach().double().requires_grad_() for name, weight in state.items()}
    if not config.untie_embeddings_and_output_weights:
        weights.pop(OUTPUT_LAYER, None)
    loss = mean_loss(logits(config, weights, batch.tokens, batch.visible), batch)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return Result(loss.detach(), dict(zip(weights, gradients, strict=True)))


def mean_loss(logits_BSV: Tensor, batch: Batch) -> Tensor:
    """Return sum of mask x (log-sum-exp of the logits - the label's logit), over the sum of the mask."""
    log_probability = logits_BSV - logits_BSV.logsumexp(dim=-1, keepdim=True)
    token_loss_BS = -log_probability.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
    mask_BS = batch.loss_mask.double()
    return (token_loss_BS * mask_BS).sum() / mask_BS.sum()


def logits(
    config: Architecture, weights: Mapping[str, Tensor], tokens_BS: Tensor, visible: Sequence[Tensor] = ()
) -> Tensor:
    """Return the logits [B, S, V]; padded vocabulary columns are columns like any other."""
    x = weights[WORD_EMBEDDINGS][tokens_BS]
    if not config.use_rotary_position_embeddings:
        x = x + weights[POSITION_EMBEDDINGS][: tokens_BS.shape[1]]
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        mask_BSS = visible[layer] if visible else torch.ones(x.shape[0], *x.shape[1:2] * 2, dtype=torch.bool).tril()
        normed = _norm(config, weights, f"{prefix}.input_layernorm", x)
        attended = x + _attention(config, weights, prefix, normed, mask_BSS)
        seen = x if config.parallel_residual else attended
        seen = _norm(config, weights, f"{prefix}.post_attention_layernorm", seen)
        x = attended + _mlp(config, weights, prefix, seen)
    x = _norm(config, weights, "head.final_layernorm", x)
    output_weight = weights[OUTPUT_LAYER if config.untie_embeddings_and_output_weights else WORD_EMBEDDINGS]
    return x @ output_weight.T


def _linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def _norm(config: Architecture, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if config.normalization == "layernorm":
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = (centred**2).mean(dim=-1, keepdim=True)
        normalised = centred / torch.sqrt(variance + config.layernorm_epsilon)
        return normalised * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    mean_square = (x**2).mean(dim=-1, keepdim=True)
    return x / torch.sqrt(mean_square + config.layernorm_epsilon) * weights[f"{name}.weight"]


def _attention(config: Architecture, weights: Mapping[str, Tensor], prefix: str, x: Tensor, mask_BSS: Tensor) -> Tensor:
    batch, sequence, _ = x.shape
    groups, size = group_count(config), head_size(config)
    queries = config.num_attention_heads // groups
    qkv = _linear(weights, f"{prefix}.self_attention.query_key_value", x)
    qkv_BSGXD = qkv.view(batch, sequence, groups, queries + 2, size)
    q_BGRSD = qkv_BSGXD[..., :queries, :].permute(0, 2, 3, 1, 4)
    k_BG1SD = qkv_BSGXD[..., queries : queries + 1, :].permute(0, 2, 3, 1, 4)
    v_BG1SD = qkv_BSGXD[..., queries + 1 :, :].permute(0, 2, 3, 1, 4)
    if config.qk_layernorm:
        q_BGRSD = _norm(config, weights, f"{prefix}.self_attention.q_layernorm", q_BGRSD)
        k_BG1SD = _norm(config, weights, f"{prefix}.self_attention.k_layernorm", k_BG1SD)
    if config.use_rotary_position_embeddings:
        q_BGRSD, k_BG1SD = _rotate(config, q_BGRSD), _rotate(config, k_BG1SD)

    scores = q_BGRSD @ k_BG1SD.transpose(-1, -2) / math.sqrt(size)
    sees_none = ~mask_BSS.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask_BSS | sees_none)[:, None, None], -math.inf)
    if f"{prefix}.self_attention.sinks" in weights:
        sinks = weights[f"{prefix}.self_attention.sinks"].view(1, groups, queries, 1, 1)
        scores = torch.cat([scores, sinks.expand(batch, -1, -1, sequence, -1)], dim=-1)
    probability = torch.softmax(scores, dim=-1)[..., :sequence].masked_fill(sees_none[:, None, None], 0.0)
    o_BGRSD = probability @ v_BG1SD
    o = o_BGRSD.permute(0, 3, 1, 2, 4).reshape(batch, sequence, -1)  # [B, G, R, S, D] -> [B, S, G*R*D]
    return _linear(weights, f"{prefix}.self_attention.dense", o)


def _rotate(config: Architecture, x: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of the first rotary dimensions of x [..., S, D] by position x theta^(-2i/rotary)."""
    rotary = int(x.shape[-1] * config.rotary_percent)
    half = rotary // 2
    frequency = config.rotary_position_embeddings_theta ** (-torch.arange(half, dtype=torch.float64) * 2 / rotary)
    angle = torch.arange(x.shape[-2], dtype=torch.float64).unsqueeze(-1) * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _mlp(config: Architecture, weights: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    inner = _linear(weights, f"{prefix}.mlp.dense_h_to_4h", x)
    if config.swiglu:
        gate, up = inner.chunk(2, dim=-1)
        inner = gate * torch.sigmoid(gate) * up
    elif config.openai_gelu:
        inner = 0.5 * inner * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (inner + 0.044715 * inner**3)))
    else:
        inner = 0.5 * inner * (1.0 + torch.erf(inner / math.sqrt(2.0)))
    return _linear(weights, f"{prefix}.mlp.dense_4h_to_h", inner)
