"""Incremental inference: a model runs on a few tokens at a time, with the keys and values of earlier tokens cached.

    for each chunk of the prompt, or each new token:
        x = embed(tokens)
        for each layer:
            run it up to its attention call: q, kv
            o     = attention merged over the new tokens themselves and the cached parts, which are prefetched
            kv   -> cache
            x     = the rest of the layer, given o

A chunk passes through all layers before the next chunk begins, so only the cache grows with the sequence. The cache is
stored on the tier of the model's store: in host memory when offloading. While a layer computes, the parts of the next
layer are prefetched. A new token is a chunk of one, whose partial results over the parts are merged all at once.

    B sequences, C new tokens of each, h hidden size, H query heads, K key/value heads, D head size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from megatron.core.documents import CAUSAL_TILE, FULL_TILE
from megatron.fpdt.attention_tiles import TileRow, attend, attend_one_token
from megatron.fpdt.block import StreamedBlock
from megatron.fpdt.plan import Tile
from megatron.fpdt.seam import AttentionCall
from megatron.fpdt.store import Prefetch
from megatron.fpdt.streamed_layer import StreamedLayer, joined
from megatron.generation.cache import BUFFER_TOKENS, KeyValueCache
from megatron.generation.errors import GenerationError
from megatron.model.streamed import StreamedExecution
from megatron.model.transformer import GPTModel, TransformerLayer
from megatron.ops.attention import AttentionBackend, AttentionRequest, AttentionVariant, choose_backend_for_few_queries

# Chunks of fewer queries use an attention backend for few queries and tiles of any length.
SHORT_CHUNK = 128


class CachedModel:
    """A model on a single process, in evaluation mode, with the first `num_ids` ids of its vocabulary.

    `short_attention` serves chunks of few tokens. With `isolated_chunks`, no chunk of a prompt attends to another.
    """

    def __init__(self, model: GPTModel, num_ids: int, isolated_chunks: bool = False) -> None:
        assert isinstance(model.execution, StreamedExecution)
        self.model = model
        self.stream = model.execution.stream
        self.num_ids = num_ids
        self.isolated_chunks = isolated_chunks
        limited = [layer.layer_number for layer in model.layers if _is_limited(cast(TransformerLayer, layer).variant)]
        if limited:
            raise GenerationError(
                f"layers {limited} have a sliding window or local blocks, which the cache of keys and values does not "
                "honor; use a model without."
            )
        weight, layer = model.embedding.word_embeddings.weight, cast(TransformerLayer, model.layers[0])
        attention = layer.self_attention
        self.short_attention = choose_backend_for_few_queries(
            AttentionRequest(weight.device, weight.dtype, attention.head_size, (attention.variant,))
        )

    @property
    def max_length(self) -> int | None:
        """Number of learned positions; None if the model has RoPE."""
        table = self.model.embedding.position_embeddings
        return None if table is None else len(table.weight)

    def check(self, prompt: Sequence[int], num_new_tokens: int) -> None:
        """Raise GenerationError for a prompt that is empty, has unknown ids or leaves no positions for new tokens."""
        check_prompt(prompt, num_new_tokens, self.num_ids, self.max_length)

    @torch.no_grad()
    def prefill(self, prompt: Sequence[int]) -> tuple[KeyValueCache, Tensor]:
        """Run a prompt; return its cache and the logits [V] of the next token."""
        stream = self.stream
        buffer_tokens = min(BUFFER_TOKENS, stream.chunk_length)
        cache = KeyValueCache(stream.store, len(self.model.layers), buffer_tokens)
        for chunk in torch.tensor(prompt, dtype=torch.int64).split(stream.chunk_length):
            if self.isolated_chunks:
                cache.forget()
            x_C1h = self.extend([cache], chunk[None])
        return cache, self.logits(x_C1h[-1:])[0, 0]

    @torch.no_grad()
    def extend(self, caches: Sequence[KeyValueCache], tokens_BC: Tensor) -> Tensor:
        """Run the tokens [B, C] that follow the B cached sequences, add them to the caches, and return the last output.

        This is the output of the last block, [C, B, h] on the compute device, as `logits` takes it. Attention runs
        sequence by sequence, as their lengths differ; token-wise work runs on the whole batch.
        """
        stream, blocks = self.stream, [cast(StreamedBlock, layer.forward) for layer in self.model.layers]
        starts_B1 = torch.tensor([[cache.length] for cache in caches])
        tokens_BC, positions_BC = (
            stream.on_device(t) for t in (tokens_BC, starts_B1 + torch.arange(tokens_BC.shape[1]))
        )
        groups = [[part] for layer in range(len(blocks)) for cache in caches for part in cache.parts(layer)]
        parts_ahead = stream.store.prefetch(groups, ahead=False)
        x_CBh = self.model.embedding.embed(tokens_BC, positions_BC)
        for number, block in enumerate(blocks):
            x_CBh = self._run_layer(number, block.layer, caches, x_CBh, positions_BC, parts_ahead)
        for cache in caches:
            cache.advance(tokens_BC.shape[1])
        stream.store.release_sent()
        return x_CBh

    @torch.no_grad()
    def logits(self, x_CBh: Tensor) -> Tensor:
        """Compute next-token logits [C, B, V] from `extend`'s output, fp32 (fp64 for fp64), known ids only."""
        logits_CBV = self.model.head.logits(x_CBh)[..., : self.num_ids]
        return logits_CBV.to(torch.promote_types(x_CBh.dtype, torch.float32))

    def _run_layer(
        self,
        number: int,
        layer: StreamedLayer,
        caches: Sequence[KeyValueCache],
        x_CBh: Tensor,
        positions_BC: Tensor,
        parts_ahead: Prefetch,
    ) -> Tensor:
        slices = [layer.start(x_CBh[s], positions_BC[:, s]) for _, s in self.stream.numbered_slices(x_CBh)]
        try:
            call = slices[0].call._replace(
                q_cBHD=joined([each.call.q_cBHD for each in slices]),
                kv_cBKD=joined([each.call.kv_cBKD for each in slices]),
            )
            o_CBHD = self._attend(number, caches, call, parts_ahead)
            parts = zip(slices, o_CBHD.split(self.stream.slice_length), strict=True)
            return joined([each.finish(o_cBHD) for each, o_cBHD in parts])
        finally:
            for each in slices:
                each.close()

    def _attend(
        self,
        number: int,
        caches: Sequence[KeyValueCache],
        call: AttentionCall,
        parts_ahead: Prefetch,
    ) -> Tensor:
        outputs = []
        for cache, q_C1HD, kv_C1KD in zip(caches, call.q_cBHD.split(1, 1), call.kv_cBKD.split(1, 1), strict=True):
            row = TileRow(self._attention(len(q_C1HD)), call.variant, _tiles(len(cache.parts(number))))
            if len(q_C1HD) == 1:
                outputs.append(attend_one_token(row, q_C1HD, kv_C1KD, parts_ahead, call.sinks_H))
            else:
                outputs.append(attend(row, q_C1HD, kv_C1KD, parts_ahead, call.sinks_H).o)
            cache.add(number, kv_C1KD)
        return torch.cat(outputs, 1)

    def _attention(self, num_tokens: int) -> AttentionBackend:
        return self.short_attention if num_tokens < SHORT_CHUNK else self.stream.attention


def _is_limited(variant: AttentionVariant) -> bool:
    """Whether a token sees less than all tokens before it."""
    return variant.window is not None or variant.local_block is not None


def _tiles(num_parts: int) -> list[Tile]:
    """Return the tiles of the new tokens against themselves and against each cached part."""
    return [Tile(num_parts, num_parts, CAUSAL_TILE), *(Tile(num_parts, key, FULL_TILE) for key in range(num_parts))]


def check_prompt(prompt: Sequence[int], num_new_tokens: int, num_ids: int, max_length: int | None) -> None:
    """Raise GenerationError for a prompt that is empty, has ids of `num_ids` or above, or is too long.

    `max_length` bounds prompt plus new tokens if positions are learned.
    """
    if not prompt:
        raise GenerationError("the prompt has no tokens, so there is nothing to continue; give at least one.")
    unknown = next((token for token in prompt if not 0 <= token < num_ids), None)
    if unknown is not None:
        raise GenerationError(
            f"token id {unknown} of the prompt is outside the model's vocabulary, ids 0 to {num_ids - 1}; use the "
            "tokenizer that it was trained with."
        )
    if max_length is not None and len(prompt) + num_new_tokens > max_length:
        raise GenerationError(
            f"the prompt ({len(prompt)} tokens) and {num_new_tokens} new ones pass the {max_length} positions that the "
            f"model has learned; use a shorter prompt, or at most {max(max_length - len(prompt), 0)} new tokens."
        )
