"""The linear products of a layer that its backward pass needs, read off the autograd graph of one run.

A product's output is needed if a node of the graph of y reads it in its backward pass. A norm or an activation does; an
addition, a view or a dropout only passes its gradient on. Two kinds of products can be skipped in recomputation: those
separated from y by such nodes only, like the MLP's last one, if y itself is not needed; and those before the attention
call on which y depends through attention alone, if the attention output is known. What a layer reads without autograd
(`detach`, a comparison) is not seen.

A product of few inputs, such as the second of a low-rank adapter, is recomputed in less time than it is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from megatron.config import Recompute
from megatron.fpdt.seam import AttentionCall, run_with_output
from megatron.ops.linear import LinearTape, QuantizedWeight

# A product is recomputed and never saved if it has so many times fewer inputs than the layer.
FEW_INPUTS = 16

# Operations whose backward pass reads none of their inputs.
_PASSES_GRADIENTS_ON = frozenset(
    (
        *("Add", "Alias", "Cat", "Clone", "Expand", "NativeDropout", "Neg", "Permute", "ReshapeAlias", "Slice"),
        *("Split", "SplitWithSizes", "Squeeze", "Stack", "Sub", "T", "ToCopy", "Transpose", "UnsafeView"),
        *("Unsqueeze", "View"),
    )
)


@dataclass(frozen=True)
class LayerTrace:
    """The products of a layer, by number (megatron.ops.linear)."""

    before: tuple[int, ...]
    """Products before the attention call."""

    before_attention_alone: frozenset[int]
    """Products before the attention call on which y depends through attention alone."""

    needed_after: tuple[int, ...]
    """Products after the attention call whose outputs the gradients of y read."""

    skipped_after: frozenset[int]
    """Products after the attention call whose outputs the gradients of y do not read."""

    shares_nodes: bool
    """Whether the graph of y has nodes in common with that of the attention call's arguments."""

    recomputed: frozenset[int] = frozenset()
    """Products that are cheaper to recompute than to save."""

    @property
    def num_products(self) -> int:
        """Products of every run."""
        return len(self.before) + len(self.needed_after) + len(self.skipped_after)

    @property
    def skipped(self) -> frozenset[int]:
        """Products whose outputs the gradients of y do not read, if the attention output is known."""
        return self.before_attention_alone | self.skipped_after

    def check(self, tape: LinearTape) -> None:
        """Raise RuntimeError unless a whole run had as many products as the one that was traced."""
        if tape.num_products != self.num_products:
            raise RuntimeError(
                f"the layer has run {tape.num_products} linear layers on a slice, and {self.num_products} on another; "
                "which ones run must not depend on the tokens"
            )

    def saved_before(self, recompute: Recompute) -> tuple[int, ...]:
        """Return the products before the attention call whose outputs the forward pass saves on the tier."""
        if not recompute.saves_products:
            return ()
        return tuple(number for number in self.before if number not in self.recomputed)

    def saved_after(self, recompute: Recompute) -> tuple[int, ...]:
        """Return the products after the attention call whose outputs the forward pass saves on the tier.

        These are all that are needed, or only the first, the output projection.
        """
        if not recompute.saves_products:
            return ()
        projection = len(self.before)
        needed = [number for number in self.needed_after if number not in self.recomputed]
        return tuple(number for number in needed if recompute.saves_mlp_products or number == projection)


def trace_layer(forward: Callable[..., Tensor], x_cBh: Tensor, *args: Any) -> LayerTrace:
    """Run a layer once, with an attention output of zeros, and analyze its autograd graph. The result is dropped."""
    calls: list[AttentionCall] = []
    tape = _TracingTape()

    def attend(call: AttentionCall) -> Tensor:
        calls.append(call)
        tape.num_before = tape.num_products
        return torch.zeros_like(call.q_cBHD).requires_grad_()

    with torch.enable_grad():
        y = run_with_output(forward, tape, attend, x_cBh.detach().requires_grad_(), *args)
    if len(calls) != 1:
        raise RuntimeError(f"the layer has called its attention {len(calls)} times; one that calls it once is streamed")
    graph = _consumers(y.grad_fn)
    needed = _needed(graph)
    before, after = range(tape.num_before), range(tape.num_before, tape.num_products)
    # A product without a node is read by something that autograd does not see.
    alone = frozenset(number for number in before if (node := tape.nodes[number]) is not None and node not in graph)
    needed_after = tuple(number for number in after if (node := tape.nodes[number]) is None or node in needed)
    q, kv, _, sinks = calls[0]
    arguments = {node for t in (q, kv, sinks) if t is not None and t.grad_fn for node in _in_order(t.grad_fn)}
    shares_nodes = any(node in graph and node.next_functions for node in arguments)
    skipped_after = frozenset(after) - frozenset(needed_after)
    few = frozenset(n for n, inputs in enumerate(tape.num_inputs) if FEW_INPUTS * inputs <= x_cBh.shape[-1])
    return LayerTrace(tuple(before), alone, needed_after, skipped_after, shares_nodes, few)


class _TracingTape(LinearTape):
    """A tape that records the autograd node of each product's output, and how many inputs it has."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node | None] = []
        self.num_inputs: list[int] = []
        self.num_before = 0

    def product(
        self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, transposed: bool = False
    ) -> Tensor:
        y = super().product(x, weight, bias, transposed)
        self.nodes.append(y.grad_fn)
        self.num_inputs.append(x.shape[-1])
        return y


def _consumers(root: Node | None) -> dict[Node, list[tuple[Node, int]]]:
    """Map each node that the root depends on to the nodes that take its output, and the index of that input.

    The nodes are in topological order, each after all of its consumers.
    """
    order = [] if root is None else list(_in_order(root))
    consumers: dict[Node, list[tuple[Node, int]]] = {node: [] for node in order}
    for node in order:
        for index, (producer, _) in enumerate(node.next_functions):
            if producer is not None:
                consumers[producer].append((node, index))
    return consumers


def _in_order(root: Node) -> Iterator[Node]:
    """Return the nodes of a graph in topological order, each before those that it depends on."""
    finished: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, is_finished = stack.pop()
        if is_finished:
            finished.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((producer, False) for producer, _ in node.next_functions if producer is not None)
    return reversed(finished)


def nodes_read(root: Node | None) -> set[Node]:
    """Return the nodes of a graph whose output values its backward pass reads; not its root, unless a node reads it."""
    return _needed(_consumers(root))


def _needed(graph: dict[Node, list[tuple[Node, int]]]) -> set[Node]:
    """Return the nodes whose output values the backward pass of other nodes reads."""
    needed: set[Node] = set()
    for node, consumers in graph.items():
        if any(_reads(consumer, index) or consumer in needed for consumer, index in consumers):
            needed.add(node)
    return needed


def _reads(node: Any, index: int) -> bool:
    """Whether a node reads the value of an input in its backward pass."""
    if node.name() == "MulBackward0":  # the gradient of one factor reads the other
        return (node._saved_self, node._saved_other)[index] is not None
    return node.name().split("Backward")[0] not in _PASSES_GRADIENTS_ON
