"""The structure that a stream needs, checked on two runs of a small copy of a model.

Its layers run one after the other, each once and on the output of the one before, and each calls attention once. What
else a layer gets is the same for any tokens, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from megatron.hf.inspection import decoder_layers
from megatron.hf.refusals import refusal

_COUNTING = "megatron-counting"
_NUM_TOKENS = 9
_LATER_TOKENS = ("mtp", "nextn")  # in the names of modules


def refuse_structure(small: PretrainedConfig) -> None:
    """Raise a ConfigError if runs of a small copy show that the model cannot be streamed."""
    model: Any = AutoModelForCausalLM.from_config(small, attn_implementation="eager")
    children = [name for part in (model, model.base_model) for name, _ in part.named_children()]
    if later := [name for name in children if any(word in name for word in _LATER_TOKENS)]:
        raise refusal(small, f"{later[0]} predicts tokens after the next one, and the loss here is of the next one")
    if not _is_causal(model):
        raise refusal(small, "its tokens attend to later ones, and a stream is causal")
    layers = list(decoder_layers(model))
    first, second = (_runs(model, layers, seed) for seed in (1, 2))
    for reason in _faults(layers, first, second):
        raise refusal(small, f"in a small copy of it {reason}")


@torch.no_grad()
def _is_causal(model: Any) -> bool:
    """Return whether the logits of all tokens but the last stay the same if the last one changes."""
    tokens = _tokens(1)
    changed = tokens.index_fill(1, torch.tensor([_NUM_TOKENS - 1]), 2)
    one, other = (model(input_ids=each, use_cache=False).logits[:, :-1] for each in (tokens, changed))
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def _tokens(seed: int) -> Tensor:
    return torch.randint(3, 24, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(seed))


@dataclass
class _LayerRun:
    """What one run of a model shows of a layer."""

    inputs: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None
    arguments: dict[str, object] = field(default_factory=dict)
    is_running: bool = False
    attention_calls: int = 0

    def begin(self, layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note what the layer gets."""
        self.is_running = True
        self.inputs.append(positional[0] if positional else named["hidden_states"])
        others = {f"argument {number}": value for number, value in enumerate(positional[1:], 2)} | named
        self.arguments = {name: value for name, value in others.items() if value is not self.inputs[-1]}

    def end(self, layer: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
        """Note what the layer returns."""
        self.is_running = False
        self.output = output[0] if isinstance(output, tuple) else output

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Return the tensors among the arguments, by name."""
        found = []
        for name, value in self.arguments.items():
            values = value if isinstance(value, list | tuple) else [value]
            found += [(name, each) for each in values if isinstance(each, Tensor)]
        return found


def _runs(model: Any, layers: Sequence[nn.Module], seed: int) -> list[_LayerRun]:
    """Run the model on some tokens; return what it shows of each layer."""
    runs = [_LayerRun() for _ in layers]
    AttentionInterface.register(_COUNTING, partial(_counting_attention, runs))
    model.set_attn_implementation(_COUNTING)
    with _noting(layers, runs):
        model(input_ids=_tokens(seed), position_ids=torch.arange(_NUM_TOKENS)[None], use_cache=False)
    return runs


@contextmanager
def _noting(layers: Sequence[nn.Module], runs: Sequence[_LayerRun]) -> Iterator[None]:
    with ExitStack() as hooks:
        for layer, run in zip(layers, runs, strict=True):
            hooks.enter_context(layer.register_forward_pre_hook(run.begin, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(run.end))
        yield


def _counting_attention(
    runs: Sequence[_LayerRun], module: nn.Module, *qkv_and_mask: Any, **how: object
) -> tuple[Tensor, None]:
    """Attend in place of the model's own function, and count the call."""
    for run in runs:
        run.attention_calls += run.is_running
    q, k, v = qkv_and_mask[:3]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous(), None


def _faults(layers: Sequence[nn.Module], first: Sequence[_LayerRun], second: Sequence[_LayerRun]) -> Iterator[str]:
    """Yield why the model cannot be streamed."""
    previous: Tensor | None = None
    for number, (layer, run, other) in enumerate(zip(layers, first, second, strict=True)):
        name = f"layer {number} ({type(layer).__name__})"
        if len(run.inputs) != 1:
            yield f"{name} runs {len(run.inputs)} times in a pass, and must run once"
        if run.attention_calls != 1:
            yield f"{name} calls attention {run.attention_calls} times, and must call it once"
        if previous is not None and run.inputs[0] is not previous:
            yield f"the input of {name} is not the output of the layer before it"
        previous = run.output
        for (argument, value), (_, again) in zip(run.tensors(), other.tensors(), strict=True):
            if value.requires_grad:
                yield f"the gradient flows through {argument} of {name}, and arguments are not differentiated"
            if not torch.equal(value, again):
                yield f"{argument} of {name} depends on the tokens, and must depend on their positions alone"
