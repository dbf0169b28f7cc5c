"""Sizes of a transformers model, read off a run of a few tokens on the meta device, which computes nothing.

What its layers ask of attention is found by megatron.hf.inspection. The run shows the linear products before and after
attention and the experts of a token, which config.json has under many names. The autograd graph shows which products
the backward pass needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from transformers import PretrainedConfig
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D

from megatron.config import ModelSizes, TokenWeights
from megatron.fpdt.layer_trace import nodes_read
from megatron.hf.attention import LayerCall, attending, register
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.fixed_rope import FOLLOWING
from megatron.hf.inspection import LayerFacts, ModelFacts, decoder_layers, inspect_empty_model, tensors_on_meta
from megatron.hf.materialization import empty_model
from megatron.hf.skeleton import Skeleton
from megatron.hf.traffic import expert_traffic

_EXPERTS = "megatron-sizes"
_NUM_TOKENS = 4
_running: ContextVar[_Layer | None] = ContextVar("layer_on_meta", default=None)


@dataclass(frozen=True)
class Description:
    """A model's layers, as it was run."""

    hidden_size: int
    layers: tuple[LayerFacts, ...]
    vocab_size: int
    learned_positions: bool
    untied: bool
    sizes: ModelSizes


def describe(config: PretrainedConfig) -> Description:
    """Build the model of a configuration without its weights, and run it on the meta device.

    Raises:
        UnsupportedModelError: its layers cannot be streamed.
        Exception: whatever transformers raises for a configuration or a model that it cannot run so.
    """
    register()
    ExpertsInterface.register(_EXPERTS, _run_experts)
    model = empty_model(_runnable(config))
    skeleton = Skeleton(model, decoder_layers(model))
    facts = inspect_empty_model(skeleton)
    return _described(model, facts, _run(skeleton, facts.hidden_size))


def _runnable(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration without what reads values, which tensors on the meta device do not have.

    These are experts, the auxiliary loss of their routers, and RoPE types that follow the positions. None has weights.
    """
    config = deepcopy(config)
    config._experts_implementation = _EXPERTS
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in (rope, *rope.values()):
        if isinstance(settings, dict) and settings.get("rope_type") in FOLLOWING:
            settings["rope_type"] = "default"
    return config


@dataclass
class _Product:
    """A linear product of a layer."""

    weights: int
    inputs: int
    outputs: int
    node: Node | None


@dataclass
class _Layer:
    """What one layer does, in its order."""

    module: nn.Module
    hidden_size: int
    before: list[_Product] = field(default_factory=list)
    after: list[_Product] = field(default_factory=list)
    attention_calls: int = 0
    read: set[Node] = field(default_factory=set)
    """The nodes whose values the backward pass reads."""

    experts_of_token: dict[nn.Module, int] = field(default_factory=dict)

    def record_product(self, module: Any, args: Any, y: Tensor) -> None:
        """Record a linear product that has run."""
        if isinstance(y, Tensor):  # a router's subclass may return something else
            product = _Product(module.weight.numel(), args[0].shape[-1], y.shape[-1], y.grad_fn)
            (self.after if self.attention_calls else self.before).append(product)


def _run(skeleton: Skeleton, hidden_size: int) -> list[_Layer]:
    """Run the model; return what its layers did."""
    layers = [_Layer(layer, hidden_size) for layer in skeleton.layers]

    def visit(number: int, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run a layer, with an autograd graph of its own."""
        layer = layers[number]
        with _recording(layer):
            y = skeleton.layer_forward(number, x.detach().requires_grad_(), arguments)
        layer.read |= nodes_read(y.grad_fn)
        if layer.attention_calls != 1:
            raise UnsupportedModelError(
                f"its layer {number} calls attention {layer.attention_calls} times, and one call is streamed"
            )
        return y

    tokens = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
    skeleton.run(visit, tensors_on_meta(skeleton.model), input_ids=tokens, position_ids=tokens)
    return layers


@contextmanager
def _recording(layer: _Layer) -> Iterator[None]:
    """Record what the layer does in this context."""
    token = _running.set(layer)
    try:
        with ExitStack() as hooks, attending(partial(_attend, layer)):
            for module in layer.module.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    hooks.enter_context(module.register_forward_hook(layer.record_product))
            yield
    finally:
        _running.reset(token)


def _attend(layer: _Layer, call: LayerCall) -> Tensor:
    q, k, v = call.q_BHTD, call.k_BKTD, call.v_BKTE
    layer.read |= {node for t in (q, k, v) if t.grad_fn is not None for node in nodes_read(t.grad_fn)}
    layer.attention_calls += 1
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).requires_grad_()


def _run_experts(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, *others: Any, **settings: Any) -> Tensor:
    if layer := _running.get():
        layer.experts_of_token[module] = index.shape[-1]
    return x * x * weights.sum(-1, keepdim=True)  # reads both, as experts do


def _described(model: Any, facts: ModelFacts, layers: Sequence[_Layer]) -> Description:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    counts = [_counts(layer) for layer in layers]
    inner = {parameter for layer in layers for parameter in layer.module.parameters()}
    outer = [parameter for parameter in model.parameters() if parameter not in inner | {embedding, head}]
    tables = {module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight in set(outer)}
    return Description(
        hidden_size=facts.hidden_size,
        layers=tuple(facts.layers),
        vocab_size=embedding.shape[0],
        learned_positions=bool(tables),
        untied=head is not embedding,
        sizes=_sizes(counts, facts.layers, sum(map(_matrix_size, outer))),
    )


@dataclass(frozen=True)
class _Counts:
    """The counts of one layer, under the names of ModelSizes."""

    block_weights: int
    largest_stack: int
    token_weights: Counter[str]
    projection_width: int
    normalizes_products: bool
    saves_output: bool
    saved_mlp_outputs: int
    mlp_outputs: int
    mlp_width: int
    expert_traffic: int


def _counts(layer: _Layer) -> _Counts:
    """Count a layer. The first product after attention is taken for its output projection."""
    needed = [product.node is None or product.node in layer.read for product in layer.after]
    saves_output = needed[:1] == [True]
    mlp = [product for product, is_needed in zip(layer.after[1:], needed[1:], strict=True) if is_needed]
    last = [product for product, is_needed in zip(layer.after, needed, strict=True) if not is_needed]
    stacks = _stacks(layer)
    before = sum(product.weights for product in layer.before)
    output = layer.after[0].weights if saves_output else 0
    in_linears = sum(product.weights for product in (*layer.before, *layer.after))
    of_experts = sum(stack.weights for stack in stacks)
    block_weights = sum(map(_matrix_size, layer.module.parameters()))
    saved = sum(product.outputs for product in mlp)
    return _Counts(
        block_weights=block_weights,
        largest_stack=max((stack.weights for stack in stacks), default=0),
        token_weights=Counter(
            before=before,
            output=output,
            mlp=sum(product.weights for product in mlp),
            last=sum(product.weights for product in last),
            unsaved=max(block_weights - in_linears - of_experts, 0) + sum(stack.token_weights for stack in stacks),
        ),
        projection_width=sum(product.outputs for product in layer.before),
        normalizes_products=any(product.node in layer.read for product in layer.before),
        saves_output=saves_output,
        saved_mlp_outputs=saved,
        mlp_outputs=saved + sum(stack.outputs for stack in stacks),
        mlp_width=(layer.after[-1].inputs if layer.after[1:] else 0) + sum(stack.inputs for stack in stacks),
        expert_traffic=sum(
            expert_traffic(experts, layer.hidden_size, chosen) for experts, chosen in layer.experts_of_token.items()
        ),
    )


@dataclass(frozen=True)
class _Stack:
    """One tensor of experts [E, .., ..]; inputs and outputs are those of all experts that run for a token."""

    weights: int
    token_weights: int
    inputs: int
    outputs: int


def _stacks(layer: _Layer) -> list[_Stack]:
    """Return the tensors of experts. Without transformers' own interface, every expert may run for every token."""
    stacks = []
    for module in layer.module.modules():
        tensors = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
        for number, tensor in enumerate(tensors):
            num_experts = tensor.shape[0]
            runs = layer.experts_of_token.get(module, num_experts)
            chosen = min(layer.experts_of_token.get(module, _chosen_experts(layer.module, num_experts)), num_experts)
            width = tensor.numel() // num_experts // layer.hidden_size * runs
            copies = layer.hidden_size * runs  # of the token, or of its result
            is_last = number == len(tensors) - 1
            stacks.append(
                _Stack(
                    weights=tensor.numel(),
                    token_weights=tensor.numel() // num_experts * chosen,
                    inputs=width if is_last else 0,
                    outputs=copies if is_last else width + copies * (number == 0),
                )
            )
    return stacks


def _chosen_experts(layer: nn.Module, num_experts: int) -> int:
    """Return the experts of a token that a router names; all where none does."""
    named = (getattr(module, "top_k", None) for module in layer.modules())
    return next((chosen for chosen in named if isinstance(chosen, int)), num_experts)


def _sizes(counts: Sequence[_Counts], attention: Sequence[LayerFacts], outer_weights: int) -> ModelSizes:
    weights = sum((each.token_weights for each in counts), Counter[str]())
    variants = [each.variant for each in attention]
    windows, blocks = [each.window for each in variants], [each.local_block for each in variants]
    return ModelSizes(
        all_block_weights=sum(each.block_weights for each in counts),
        block_weights=max(each.block_weights for each in counts),
        largest_stack=max(each.largest_stack for each in counts),
        outer_weights=outer_weights,
        token_weights=TokenWeights(**{name: weights[name] for name in ("before", "output", "mlp", "last", "unsaved")}),
        projection_width=max(each.projection_width for each in counts),
        normalizes_products=any(each.normalizes_products for each in counts),
        saves_output=any(each.saves_output for each in counts),
        saved_mlp_outputs=max(each.saved_mlp_outputs for each in counts),
        mlp_outputs=max(each.mlp_outputs for each in counts),
        mlp_width=max(each.mlp_width for each in counts),
        expert_traffic=sum(each.expert_traffic for each in counts) // len(counts),
        narrow_channels=max(each.narrow_head_size for each in attention),
        softcap=next((each.softcap for each in variants if each.softcap is not None), None),
        windows=tuple(windows) if any(windows) else (),
        local_blocks=tuple(blocks) if any(blocks) else (),
    )


def _matrix_size(parameter: Tensor) -> int:
    """Return the weights of a matrix or a stack of matrices; 0 for a norm or a bias."""
    return parameter.numel() if parameter.ndim > 1 else 0
