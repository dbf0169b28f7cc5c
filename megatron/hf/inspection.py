"""What a transformers model is made of, found by running it on a few tokens before anything is trained.

Three runs, none of which computes a layer beyond its attention call:

    on the meta device, from tokens     which modules run before the first layer and after the last, what each layer
                                        asks of attention, which parameters the logits read
    on the meta device, from inputs     what still runs before the first layer then
    on the model's own device           the mask of each layer, and whether a token's arguments depend on others

A model whose answers do not fit a stream of layers is refused by an UnsupportedModelError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from megatron.hf.attention import INSPECTED, STREAMED, LayerCall, MaskStandIn, Settings, attending
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.masks import LayerMask, mask_of
from megatron.hf.skeleton import Skeleton
from megatron.ops.attention import AttentionVariant

Found = TypeVar("Found")

META = torch.device("meta")
_BATCH, _TOKENS = 2, 3
# A position beyond which RoPE that follows the largest one changes.
_FAR = 1_000_003


class LayerFacts(NamedTuple):
    """What a layer asks of attention."""

    settings: Settings
    variant: AttentionVariant
    num_heads: int
    num_key_value_heads: int
    head_size: int
    """Of queries, keys and values, the largest."""

    narrow_head_size: int
    """Of queries, keys and values, the smallest."""

    dropout: float
    same_arguments_as: int
    """Number of the first layer that gets the same arguments."""


@dataclass(frozen=True)
class ModelFacts:
    """The parts of a model: modules with parameters before the layers and after them, and the layers."""

    embedding: Sequence[nn.Module]
    head: Sequence[nn.Module]
    layers: Sequence[LayerFacts]
    hidden_size: int
    num_classes: int


class _Attention(BaseException):
    """A layer has reached its attention call."""

    def __init__(self, call: LayerCall) -> None:
        self.call = call


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of a model's decoder layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of its {count} layers")
    return max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))


def inspect_model(skeleton: Skeleton) -> ModelFacts:
    """Find the parts of a model; its `skeleton` then bypasses what it has to. UnsupportedModelError for others."""
    with _refusing(skeleton):
        facts = _inspect(skeleton)
        _check_tokens_are_independent(skeleton, sorted({layer.same_arguments_as for layer in facts.layers}))
    return facts


def inspect_empty_model(skeleton: Skeleton) -> ModelFacts:
    """Find the parts of a model whose parameters are on the meta device, before its RoPE is that of the run."""
    with _refusing(skeleton):
        return _inspect(skeleton)


@contextmanager
def _refusing(skeleton: Skeleton) -> Iterator[None]:
    """Raise an UnsupportedModelError for any error of the model's own code."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:  # the model's own code may raise any
        name = type(skeleton.model).__name__
        raise UnsupportedModelError(
            f"{name} cannot be run without its layers, and is not streamed: {_first_line(error)}"
        ) from error


def _inspect(skeleton: Skeleton) -> ModelFacts:
    model: Any = skeleton.model
    set_attention(model, STREAMED)
    run = _TracedRun(skeleton)
    run.from_tokens()
    _check_owners(skeleton, run)
    for module, tail in run.from_inputs():
        skeleton.bypass(module, tail)
    arguments = skeleton.arguments_of_all(*_inputs(skeleton, range(_TOKENS)))
    set_attention(model, INSPECTED)
    masks = [_mask_in(each) for each in skeleton.arguments_of_all(*_inputs(skeleton, range(_TOKENS)))]
    set_attention(model, STREAMED)
    firsts = [next(m for m in range(n + 1) if _same(arguments[m], arguments[n])) for n in range(len(arguments))]
    layers = [_facts(call, mask, first) for call, mask, first in zip(run.calls, masks, firsts, strict=True)]
    return ModelFacts(run.before, run.after, layers, run.hidden_size, run.num_classes)


def set_attention(model: Any, name: str) -> None:
    """Let the model call a registered attention function."""
    model.set_attn_implementation(name)
    if model.config.get_text_config()._attn_implementation != name:
        raise UnsupportedModelError(f"{type(model).__name__} does not let its attention be chosen")


class _TracedRun:
    """Runs of a model on the meta device."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton, self._model = skeleton, skeleton.model
        own = [*self._model.named_parameters(), *self._model.named_buffers()]
        self.names = {id(tensor): name for name, tensor in own}
        self._tensors = tensors_on_meta(self._model)
        self.calls: list[LayerCall] = []
        self.hidden_size, self.dtype = 0, torch.float32
        self._seen: list[nn.Module] = []
        self._outputs: dict[nn.Module, Sequence[int]] = {}
        self._output: Tensor | None = None
        self.before: list[nn.Module] = []
        self.after: list[nn.Module] = []

    def from_tokens(self) -> None:
        """Run on tokens: find the modules outside of the layers, and the attention calls."""
        tokens = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64, device=META)
        for self._skeleton.returns_tuples in (False, True):
            self._begin()
            self.calls.clear()
            try:
                logits = self._run(self._visit_layer, input_ids=tokens).logits
                break
            except _OutputTaken:
                continue
        else:
            raise UnsupportedModelError(f"{self._name} changes the hidden states between its layers")
        if len(self.calls) != len(self._skeleton.layers):
            raise UnsupportedModelError(f"{self._name} calls {len(self.calls)} of its layers")
        self.num_classes, self.read_by_logits = logits.shape[-1], _parameters_of(logits)

    def from_inputs(self) -> Iterator[tuple[nn.Module, Sequence[int]]]:
        """Run on inputs in place of tokens; return the modules with parameters that run, and their outputs' sizes."""
        self._begin()
        x = torch.zeros(_BATCH, _TOKENS, self.hidden_size, dtype=self.dtype, device=META, requires_grad=True)
        outputs: list[tuple[nn.Module, Sequence[int]]] = []

        def visit(number: int, h: Tensor, arguments: dict[str, Any]) -> Tensor:
            if not number:
                outputs.extend((module, self._outputs[module]) for module in dict.fromkeys(self._seen))
                self._seen = []
            for name, value in arguments.items():
                if any(tensor.requires_grad for tensor in _tensors_in(value)):
                    raise UnsupportedModelError(f"{self._name} computes {name} of its layers from the hidden states")
            return x

        self._run(visit, inputs_embeds=x)
        for module, shape in outputs:
            if tuple(shape[:2]) != (_BATCH, _TOKENS):
                raise UnsupportedModelError(f"{type(module).__name__} before the layers is not token-wise")
        return iter([(module, shape[2:]) for module, shape in outputs])

    @property
    def _name(self) -> str:
        return type(self._model).__name__

    def _begin(self) -> None:
        self._seen, self._outputs = [], {}

    def _run(self, visit: Callable[[int, Tensor, dict[str, Any]], Tensor], **inputs: Any) -> Any:
        positions = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64, device=META)
        with self._watching_modules(), torch.enable_grad():
            result = self._skeleton.run(visit, self._tensors, position_ids=positions, **inputs)
        self.after = list(dict.fromkeys(self._seen))
        return result

    @contextmanager
    def _watching_modules(self) -> Iterator[None]:
        """Note the modules with parameters of their own as they run."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if any(True for _ in module.parameters(recurse=False)):
                self._seen.append(module)
                self._outputs[module] = getattr(output, "shape", ())

        handle = register_module_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def _visit_layer(self, number: int, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run a layer up to its attention call; return a new tensor, which the next layer must get."""
        if number == 0:
            self.before, self.hidden_size, self.dtype = list(dict.fromkeys(self._seen)), x.shape[-1], x.dtype
            self.read_before = _parameters_of(x)
        elif x is not self._output:
            raise _OutputTaken
        elif self._seen:
            raise UnsupportedModelError(f"{self._name} runs {type(self._seen[0]).__name__} between its layers")
        self.calls.append(self._attention_call(number, x, arguments))
        self._seen = []
        self._output = torch.zeros_like(x)
        return self._output

    def _attention_call(self, number: int, x: Tensor, arguments: dict[str, Any]) -> LayerCall:
        def attend(call: LayerCall) -> Tensor:
            raise _Attention(call)

        error: Exception | None = None
        try:
            with attending(attend):
                self._skeleton.layer_forward(number, x, arguments)
        except _Attention as reached:
            return reached.call
        except UnsupportedModelError:
            raise
        except Exception as raised:  # what follows attention may not run on the meta device
            error = raised
        name, reason = type(self._skeleton.layers[number]).__name__, f" before {_first_line(error)}" if error else ""
        raise UnsupportedModelError(
            f"layer {number} ({name}) does not call attention{reason}, and cannot be streamed"
        ) from error


class _OutputTaken(BaseException):
    """A layer got something else than the output of the one before."""


def _check_owners(skeleton: Skeleton, run: _TracedRun) -> None:
    """Refuse parameters that are in no part of the model, or in several that run apart."""
    both = [module for module in run.before if module in run.after]
    if both:
        raise UnsupportedModelError(f"{type(both[0]).__name__} runs before the layers and after them")
    meta = {id(tensor): name for name, tensor in run._tensors.items()}
    parts = {
        "before the layers": (run.before, run.read_before),
        "after the layers": (run.after, run.read_by_logits),
    }
    owned = {id(p) for layer in skeleton.layers for p in layer.parameters()}
    for where, (modules, read) in parts.items():
        own = {id(p) for module in modules for p in module.parameters(recurse=False)}
        owned |= own
        names = {run.names[each] for each in own}
        if outside := [meta[each] for each in read if each in meta and meta[each] not in names]:
            raise UnsupportedModelError(f"the model reads {outside[0]} {where} without calling its module")
    if missing := [name for name, p in skeleton.model.named_parameters() if id(p) not in owned]:
        raise UnsupportedModelError(
            f"no part of the model before, in or after its layers uses {', '.join(missing[:4])}"
        )


def _facts(call: LayerCall, mask: MaskStandIn | None, first: int) -> LayerFacts:
    name = type(call.module).__name__
    if mask is None and not getattr(call.module, "is_causal", True):
        raise UnsupportedModelError(f"{name} attends to later tokens")
    if call.mask is not None:
        raise UnsupportedModelError(f"{name} attends with a mask that the model creates by itself")
    pattern = LayerMask(window=call.settings.sliding_window) if mask is None else mask_of(mask, call.settings, name)
    size = call.q_BHTD.shape[-1]
    scale = size**-0.5 if call.settings.scaling is None else float(call.settings.scaling)
    return LayerFacts(
        settings=call.settings,
        variant=pattern.variant(scale, call.settings.softcap),
        num_heads=call.q_BHTD.shape[1],
        num_key_value_heads=call.k_BKTD.shape[1],
        head_size=max(size, call.v_BKTE.shape[-1]),
        narrow_head_size=min(size, call.v_BKTE.shape[-1]),
        dropout=call.dropout,
        same_arguments_as=first,
    )


def _inputs(skeleton: Skeleton, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return hidden states of one sequence, and its positions."""
    weight: Any = next(p for p in skeleton.layers[0].parameters() if p.is_floating_point())
    config: Any = skeleton.model.config
    hidden_size = config.get_text_config().hidden_size
    device = torch.device("cpu") if weight.is_meta else weight.device  # masks and buffers have values
    x = torch.zeros(1, len(positions), hidden_size, dtype=weight.dtype, device=device)
    return x, torch.tensor([list(positions)], device=device)


def _check_tokens_are_independent(skeleton: Skeleton, layers: Sequence[int]) -> None:
    """Refuse a model that computes the arguments of one token from the positions of others."""
    positions = (3, 0, min(_FAR, _num_positions(skeleton.model) - 1), 40)
    for number in layers:
        whole = skeleton.arguments(number, *_inputs(skeleton, positions))
        alone = [skeleton.arguments(number, *_inputs(skeleton, [position])) for position in positions]
        for name, value in whole.items():
            parts = [_tensors_in(each[name]) for each in alone]
            for tensor, *each in zip(_tensors_in(value), *parts, strict=True):
                if not _is_joined(tensor, each):
                    raise UnsupportedModelError(
                        f"{type(skeleton.model).__name__} computes {name} of a token from the positions of others, as "
                        "dynamic NTK and longrope do; call megatron.hf.fixed_rope.fix_rope(model, seq_length) first"
                    )


def _num_positions(model: Any) -> int:
    """Return how many positions a model has rows for in a table of its own, if it has one, else any number."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    has_table = any(buffer.ndim == 2 and buffer.shape[0] == known for buffer in model.buffers())
    return known if has_table else _FAR + 1


def _is_joined(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether parts of one token each, along some dimension, are equal to the whole."""
    axes = [axis for axis in range(whole.ndim) if whole.shape[axis] != parts[0].shape[axis]]
    if not axes:
        return all(torch.equal(whole, part) for part in parts)
    return len(axes) == 1 and torch.equal(whole, torch.cat(list(parts), axes[0]))


def _mask_in(arguments: Mapping[str, Any]) -> MaskStandIn | None:
    """Return the mask among a layer's arguments. UnsupportedModelError if there are several to choose from."""
    masks = {id(mask): mask for mask in _found(MaskStandIn, arguments)}
    if len(masks) > 1:
        raise UnsupportedModelError("a layer gets several masks, and which of them it attends with is not known")
    return next(iter(masks.values()), None)


def _same(some: Any, other: Any) -> bool:
    """Whether two layers' arguments are the same tensors and values."""
    if isinstance(some, Mapping) and isinstance(other, Mapping):
        return some.keys() == other.keys() and all(_same(some[key], other[key]) for key in some)
    if isinstance(some, tuple | list) and isinstance(other, tuple | list):
        return len(some) == len(other) and all(_same(*pair) for pair in zip(some, other, strict=True))
    if isinstance(some, Tensor) or isinstance(other, Tensor):
        return some is other
    return bool(some == other)


def _tensors_in(value: Any) -> list[Tensor]:
    return list(_found(Tensor, value))


def _found(kind: type[Found], value: Any) -> Iterator[Found]:
    """Return the values of a kind among a layer's arguments, in any tuples, lists and mappings of them."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _found(kind, each)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def tensors_on_meta(model: nn.Module) -> dict[str, Tensor]:
    """Return tensors without memory in place of a model's parameters and buffers, by name."""
    return {name: _on_meta(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _on_meta(tensor: Any) -> Tensor:
    """Return a tensor without memory of a parameter's or buffer's shape, also if ZeRO-3 has partitioned it."""
    empty = torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device=META)
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else empty


def _parameters_of(tensor: Tensor) -> set[int]:
    """Return the ids of the leaves that a tensor is computed from."""
    found: set[int] = set()
    todo, seen = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(producer for producer, _ in node.next_functions)
    return found
