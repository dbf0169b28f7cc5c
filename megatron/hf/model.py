"""A Hugging Face decoder in the form in which models are executed here: embedding, layers and head.

Each part is a unit of its own, to which DeepSpeed attaches its hooks: ZeRO-3 gathers a unit's weights once per forward
and once per backward pass. The units run the model's own code (megatron.hf.skeleton). Parameters have the names that
they have in transformers.

    S tokens, T of one slice, B batch, h hidden size, H query heads, K key/value heads
    D head size of queries and keys, E of values
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.documents import Documents
from megatron.fpdt.random_state import generator_state
from megatron.hf.attention import LayerCall, attending
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.inspection import LayerFacts, ModelFacts
from megatron.hf.products import put_on_tape
from megatron.hf.query_scale import take_query_scale
from megatron.hf.routing import Routing
from megatron.hf.skeleton import Skeleton
from megatron.model.layers import CoreAttention
from megatron.model.transformer import LanguageModel, ModelExecution


class Unit(nn.Module):
    """A part of the model, whose weights are gathered together."""

    def __init__(self, skeleton: Skeleton, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._skeleton = skeleton
        self._draws: bool | None = None
        put_on_tape(self)

    @property
    def uses_dropout(self) -> bool:
        """Whether the unit draws random numbers now; also before its first run in training, which tells."""
        return self.training and self._draws is not False

    @contextmanager
    def _noting_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Learn from the first whole run in training whether the unit draws random numbers, whatever it draws for."""
        if not self.training or self._draws is not None:
            yield
            return
        before = generator_state(device)
        yield
        self._draws = not torch.equal(before, generator_state(device))


class EmbeddingUnit(Unit):
    """All modules with parameters before the first layer."""

    def __init__(self, skeleton: Skeleton, facts: ModelFacts, execution: ModelExecution) -> None:
        super().__init__(skeleton, facts.embedding)
        self.execution, self.hidden_size = execution, facts.hidden_size

    def embed(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Embed any tokens of the sequence: [S, B, h]."""
        with self._noting_random_numbers(tokens_BS.device):
            return self._skeleton.embed(tokens_BS, positions_BS).transpose(0, 1).contiguous()

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, anchor: Tensor) -> Tensor:
        return self.execution.embedding(self, tokens_BS, positions_BS, anchor)


class DecoderLayer(Unit):
    """One decoder layer. `layer_number` counts from 1."""

    core_attention: CoreAttention

    def __init__(self, skeleton: Skeleton, number: int, facts: LayerFacts, head_size: int) -> None:
        super().__init__(skeleton, [skeleton.layers[number]])
        self.layer_number, self.variant = number + 1, facts.variant
        self._number, self._facts, self._head_size = number, facts, head_size
        self._query_scale = take_query_scale(skeleton.layers[number])

    def set_core_attention(self, core_attention: CoreAttention) -> None:
        self.core_attention = core_attention

    def forward(self, x_SBh: Tensor, positions_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """Return the residual stream [S, B, h] after the layer."""
        x_BSh = x_SBh.transpose(0, 1).contiguous()
        arguments = self._skeleton.arguments(self._facts.same_arguments_as, x_BSh, positions_BS)
        with self._noting_random_numbers(x_SBh.device), attending(partial(self._attend, positions_BS, documents)):
            y_BSh = self._skeleton.layer_forward(self._number, x_BSh, arguments)
        return y_BSh.transpose(0, 1).contiguous()

    def _attend(self, positions_BT: Tensor, documents: Documents | None, call: LayerCall) -> Tensor:
        """Attend as the layer's call says: o [B, T, H, E]. Heads are padded to one size with zeros."""
        if call.settings != self._facts.settings or call.mask is not None:
            raise UnsupportedModelError(
                f"layer {self._number} attends with {call.settings}, and with {self._facts.settings} at the start"
            )
        q_BHTD = call.q_BHTD if self._query_scale is None else self._query_scale.scaled(call.q_BHTD, positions_BT)
        q, k, v = (self._padded(t.permute(2, 0, 1, 3)) for t in (q_BHTD, call.k_BKTD, call.v_BKTE))
        o_TBHD = self.core_attention(
            q.contiguous(), torch.cat([k, v], 2), self.variant, call.dropout, documents, call.sinks_H
        )
        return o_TBHD[..., : call.v_BKTE.shape[-1]].transpose(0, 1)

    def _padded(self, t: Tensor) -> Tensor:
        missing = self._head_size - t.shape[-1]
        return F.pad(t, (0, missing)) if missing else t


class HeadUnit(Unit):
    """All modules with parameters after the last layer."""

    def __init__(self, skeleton: Skeleton, facts: ModelFacts, execution: ModelExecution) -> None:
        super().__init__(skeleton, facts.head)
        self.execution, self.num_classes = execution, facts.num_classes

    def logits(self, x_Nh: Tensor) -> Tensor:
        """Compute the logits [N, V] of any tokens."""
        return self._skeleton.logits(x_Nh[None])[0]

    def forward(self, x_SBh: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return self.execution.loss(self, x_SBh, labels_BS, mask_BS)


UNITS: tuple[type[Unit], ...] = (EmbeddingUnit, DecoderLayer, HeadUnit)


class HuggingFaceModel(LanguageModel):
    """A Hugging Face decoder that returns its loss."""

    routing: Routing | None = None
    """What balances and counts its experts."""

    def __init__(self, skeleton: Skeleton, facts: ModelFacts, execution: ModelExecution) -> None:
        super().__init__()
        self.execution = execution
        # Not registered as a module: DeepSpeed's hooks are for the units alone.
        self.skeleton = skeleton
        head_size = max(each.head_size for each in facts.layers)
        self.embedding = EmbeddingUnit(skeleton, facts, execution)
        self.layers = nn.ModuleList(
            DecoderLayer(skeleton, number, each, head_size) for number, each in enumerate(facts.layers)
        )
        self.head = HeadUnit(skeleton, facts, execution)

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        mask_BS: Tensor,
        positions_BS: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        """Compute the sum of token losses; its gradient includes that of the routers' auxiliary loss, if any."""
        routing = self.routing if self.training and torch.is_grad_enabled() else None
        if routing is not None:
            routing.start()
        loss = super().forward(tokens_BS, labels_BS, mask_BS, positions_BS, documents)
        return loss if routing is None else routing.finish(loss, mask_BS)

    def take_report(self) -> dict[str, float]:
        return {} if self.routing is None else self.routing.take_report()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return self.skeleton.model.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        return self.skeleton.model.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state: dict[str, Any] = self.skeleton.model.state_dict(*args, **kwargs)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.skeleton.model.load_state_dict(state_dict, strict, assign)

    def train(self, mode: bool = True) -> HuggingFaceModel:
        super().train(mode)
        self.skeleton.model.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HuggingFaceModel:
        """Convert parameters and move buffers, which keep their number format: RoPE's frequencies have to be exact."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            return converted if isinstance(tensor, nn.Parameter) else tensor.to(converted.device)

        self.skeleton.model._apply(convert)
        return self
