"""Sizes of a transformers model, read off one run of a few tokens on the meta device, which computes nothing.

The run shows what config.json says under many names: the heads and windows at each attention call, the linear products
before and after it, and the experts of a token. The autograd graph shows which products the backward pass needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D

from megatron.config import ModelSizes, TokenWeights
from megatron.fpdt.layer_trace import nodes_read

_IMPLEMENTATION = "megatron-sizes"
_NUM_TOKENS = 4
_running: ContextVar[_Run | None] = ContextVar("run_on_meta", default=None)


@dataclass(frozen=True)
class Attention:
    """The attention call of one layer."""

    num_heads: int
    num_key_value_heads: int
    head_size: int
    value_size: int
    dropout: float
    softcap: float | None
    window: int | None
    local_block: int | None


@dataclass(frozen=True)
class Description:
    """A model's layers, as it was run."""

    hidden_size: int
    layers: tuple[Attention, ...]
    vocab_size: int
    learned_positions: bool
    untied: bool
    sizes: ModelSizes


def describe(config: PretrainedConfig) -> Description:
    """Build and run the model of a configuration on the meta device.

    Raises:
        Exception: whatever transformers raises for a configuration or a model that it cannot run so.
        ValueError: the model's layers cannot be told apart, or one has another number of attention calls than one.
    """
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, _mask)
    ExpertsInterface.register(_IMPLEMENTATION, _run_experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            _with_fixed_rope(config), attn_implementation=_IMPLEMENTATION, experts_implementation=_IMPLEMENTATION
        )
        run = _Run(config)
        with run.recording(model):
            model(
                input_ids=torch.zeros(1, _NUM_TOKENS, dtype=torch.long),
                attention_mask=torch.ones(1, _NUM_TOKENS, dtype=torch.long),  # without it, positions are compared
                use_cache=False,
            )
    return _described(model, run)


def _with_fixed_rope(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration without RoPE types that read positions, which have no values on the meta device."""
    config = deepcopy(config)
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in (rope, *rope.values()):
        if isinstance(settings, dict) and settings.get("rope_type") in ("dynamic", "longrope"):
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
    hidden_size: int = 0
    before: list[_Product] = field(default_factory=list)
    after: list[_Product] = field(default_factory=list)
    calls: list[Attention] = field(default_factory=list)
    read: set[Node] = field(default_factory=set)
    """The nodes whose values the backward pass reads."""

    experts_of_token: dict[nn.Module, int] = field(default_factory=dict)


class _Mask:
    """A stand-in for a mask, which layers pass on to attention unread."""

    def __init__(self, local_size: int | None) -> None:
        self.local_size = local_size


class _Run:
    """The record of a run."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.layers: list[_Layer] = []
        self._block = getattr(config, "attention_chunk_size", None)
        self._current: _Layer | None = None

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record what runs in this context."""
        handles = []
        for layer in decoder_layers(model):
            handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._leave))
            linears = [module for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)]
            handles += [module.register_forward_hook(self._record_product) for module in linears]
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
            for handle in handles:
                handle.remove()

    def record_attention(self, qkv: tuple[Tensor, Tensor, Tensor], mask: Any, settings: dict[str, Any]) -> None:
        q, k, v = qkv
        window, block = settings.get("sliding_window"), None
        if window is None and isinstance(mask, _Mask):
            window, block = (None, mask.local_size) if mask.local_size == self._block else (mask.local_size, None)
        if self._current is None:
            return
        self._current.read |= {node for t in qkv if t.grad_fn is not None for node in nodes_read(t.grad_fn)}
        self._current.calls.append(
            Attention(
                q.shape[1],
                k.shape[1],
                q.shape[3],
                v.shape[3],
                settings.get("dropout") or 0.0,
                settings.get("softcap"),
                window,
                block,
            )
        )

    def record_experts(self, module: nn.Module, experts_of_token: int) -> None:
        if self._current is not None:
            self._current.experts_of_token[module] = experts_of_token

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Begin a layer, and its autograd graph."""
        x, *others = args if args else (kwargs["hidden_states"],)
        self._current = _Layer(layer, x.shape[-1])
        self.layers.append(self._current)
        x = x.detach().requires_grad_()
        return ((x, *others), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if self._current is not None:
            self._current.read |= nodes_read(y.grad_fn)
        self._current = None

    def _record_product(self, module: Any, args: Any, y: Tensor) -> None:
        if self._current is not None and isinstance(y, Tensor):  # a router's subclass may return something else
            product = _Product(module.weight.numel(), args[0].shape[-1], y.shape[-1], y.grad_fn)
            (self._current.after if self._current.calls else self._current.before).append(product)


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **settings: Any) -> tuple[Tensor, None]:
    if run := _running.get():
        run.record_attention((q, k, v), mask, settings)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).requires_grad_(), None


def _mask(local_size: int | None = None, **settings: Any) -> _Mask:
    return _Mask(local_size)


def _run_experts(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, *others: Any, **settings: Any) -> Tensor:
    if run := _running.get():
        run.record_experts(module, index.shape[-1])
    return x * x * weights.sum(-1, keepdim=True)  # reads both, as experts do


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of a model's layers: the longest one that is not within another; ValueError without one."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise ValueError("it has no list of layers")
    return max(outermost, key=len)


def _described(model: Any, run: _Run) -> Description:
    if len(run.layers) != len(decoder_layers(model)):
        raise ValueError(f"it ran {len(run.layers)} of its {len(decoder_layers(model))} layers")
    for number, layer in enumerate(run.layers):
        if len(layer.calls) != 1:
            raise ValueError(f"its layer {number} calls attention {len(layer.calls)} times, and one call is streamed")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    counts = [_counts(layer) for layer in run.layers]
    attention = tuple(layer.calls[0] for layer in run.layers)
    inner = {parameter for layer in run.layers for parameter in layer.module.parameters()}
    outer = [parameter for parameter in model.parameters() if parameter not in inner | {embedding, head}]
    tables = {module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight in set(outer)}
    return Description(
        hidden_size=run.layers[0].hidden_size,
        layers=attention,
        vocab_size=embedding.shape[0],
        learned_positions=bool(tables),
        untied=head is not embedding,
        sizes=_sizes(counts, attention, sum(map(_matrix_size, outer))),
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


def _sizes(counts: Sequence[_Counts], attention: Sequence[Attention], outer_weights: int) -> ModelSizes:
    weights = sum((each.token_weights for each in counts), Counter[str]())
    windows, blocks = ([getattr(each, name) for each in attention] for name in ("window", "local_block"))
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
        narrow_channels=max(min(each.head_size, each.value_size) for each in attention),
        softcap=next((each.softcap for each in attention if each.softcap is not None), None),
        windows=tuple(windows) if any(windows) else (),
        local_blocks=tuple(blocks) if any(blocks) else (),
    )


def _matrix_size(parameter: Tensor) -> int:
    """Return the weights of a matrix or a stack of matrices; 0 for a norm or a bias."""
    return parameter.numel() if parameter.ndim > 1 else 0
