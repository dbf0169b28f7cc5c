"""GPT and LLaMA: embedding, pre-norm blocks, norm, head and loss.

    a = x + attention(norm(x), positions)
    y = a + mlp(norm(a))                     mlp(norm(x)) with a parallel residual

The modules define the computation only. megatron.model.builder chooses whether it runs on the whole sequence or chunk
by chunk: it sets the `execution` of embedding and head, and the `core_attention` of the layers.

    S tokens, B batch, h hidden size, H query heads, K key/value heads, D head size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.core.documents import Documents
from megatron.fpdt.loss import StreamableHead
from megatron.fpdt.stream import Layer
from megatron.fpdt.tokenwise import StreamableEmbedding
from megatron.model.initialization import Initializer
from megatron.model.layers import MLP, CoreAttention, Embedding, Linear, SelfAttention, build_norm
from megatron.ops.attention import AttentionVariant


class ExecutableLayer(Layer, Protocol):
    """The interface of a layer to whatever executes it."""

    forward: Callable[..., Tensor]

    def set_core_attention(self, core_attention: CoreAttention) -> None:
        """Set the attention that `forward` calls."""
        ...


class ModelExecution(Protocol):
    """Runs the parts of a model on this rank's tokens, and decides where tensors are stored in between."""

    def embedding(self, module: StreamableEmbedding, tokens_BS: Tensor, positions_BS: Tensor, anchor: Tensor) -> Tensor:
        """Embed this rank's tokens: the residual stream [S/p, B, h]."""
        ...

    def loss(self, module: StreamableHead, x_SBh: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Compute the sum of the masked token losses."""
        ...


class TokenEmbedding(nn.Module):
    """Word embedding, plus a learned position embedding if the model has no RoPE."""

    def __init__(
        self, config: ModelConfig, padded_vocab_size: int, initializer: Initializer, execution: ModelExecution
    ) -> None:
        super().__init__()
        self.execution = execution
        self.hidden_size, self.dropout = config.hidden_size, config.hidden_dropout
        self.word_embeddings = Embedding(padded_vocab_size, config.hidden_size, initializer)
        self.position_embeddings = (
            None
            if config.use_rotary_position_embeddings
            else Embedding(config.max_position_embeddings, config.hidden_size, initializer)
        )

    @property
    def uses_dropout(self) -> bool:
        return self.training and self.dropout > 0

    def embed(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Embed any tokens of the sequence: [S, B, h]."""
        x = self.word_embeddings(tokens_BS.T)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions_BS.T)
        return F.dropout(x, self.dropout, self.training)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, anchor: Tensor) -> Tensor:
        return self.execution.embedding(self, tokens_BS, positions_BS, anchor)


class TransformerLayer(nn.Module):
    """One pre-norm block. `layer_number` counts from 1."""

    def __init__(self, config: ModelConfig, layer_number: int, initializer: Initializer) -> None:
        super().__init__()
        self.layer_number, self.dropout = layer_number, config.hidden_dropout
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = build_norm(config, initializer)
        self.self_attention = SelfAttention(config, initializer)
        self.post_attention_layernorm = build_norm(config, initializer)
        self.mlp = MLP(config, initializer)

    def set_core_attention(self, core_attention: CoreAttention) -> None:
        self.self_attention.core_attention = core_attention

    @property
    def uses_dropout(self) -> bool:
        return self.training and self.dropout > 0

    @property
    def variant(self) -> AttentionVariant:
        """How the tokens of the sequence attend to each other."""
        return self.self_attention.variant

    def forward(self, x_SBh: Tensor, positions_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """Return the residual stream [S, B, h] after the block."""
        attention_SBh = self.self_attention(self.input_layernorm(x_SBh), positions_BS, documents)
        residual_SBh = x_SBh + F.dropout(attention_SBh, self.dropout, self.training)
        mlp_input_SBh = x_SBh if self.parallel_residual else residual_SBh
        mlp_SBh = self.mlp(self.post_attention_layernorm(mlp_input_SBh))
        return residual_SBh + F.dropout(mlp_SBh, self.dropout, self.training)


class LanguageModelHead(nn.Module):
    """Final norm and output layer; a tied output layer shares the word embedding's weight."""

    def __init__(
        self,
        config: ModelConfig,
        padded_vocab_size: int,
        initializer: Initializer,
        execution: ModelExecution,
        tied_weight: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.execution = execution
        self.final_layernorm = build_norm(config, initializer)
        self.output_layer = Linear(config.hidden_size, padded_vocab_size, initializer, bias=False, weight=tied_weight)
        self.num_classes = padded_vocab_size

    def logits(self, x_Nh: Tensor) -> Tensor:
        """Compute the logits [.., V] of any tokens [.., h]."""
        logits: Tensor = self.output_layer(self.final_layernorm(x_Nh))
        return logits

    def forward(self, x_SBh: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return self.execution.loss(self, x_SBh, labels_BS, mask_BS)


class LanguageModel(nn.Module):
    """A decoder-only language model that returns its loss: embedding, layers and head, each of which is executed."""

    execution: ModelExecution
    embedding: nn.Module
    layers: nn.ModuleList
    head: nn.Module

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        mask_BS: Tensor,
        positions_BS: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        """Compute the sum of this rank's masked token losses, a scalar in fp32 (fp64 for fp64).

        Tokens, labels and positions int64 [B, S/p] and mask [B, S/p] are this rank's, in its SequenceLayout's order.
        `documents` are those of the whole sequences; without them, each sequence is one document.
        """
        # ZeRO-3 detects the end of a module's backward pass by the gradient of its input; tokens have no gradient.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        x = self.embedding(tokens_BS, positions_BS, anchor)
        for layer in self.layers:
            x = layer(x, positions_BS, documents)
        loss: Tensor = self.head(x, labels_BS, mask_BS)
        return loss

    def take_report(self) -> dict[str, float]:
        """Return what the log says of the steps since the last call, as fields of its record. Waits for the device."""
        return {}


class GPTModel(LanguageModel):
    """GPT or LLaMA."""

    embedding: TokenEmbedding
    head: LanguageModelHead

    def __init__(
        self, config: ModelConfig, padded_vocab_size: int, initializer: Initializer, execution: ModelExecution
    ) -> None:
        super().__init__()
        self.execution = execution
        self.embedding = TokenEmbedding(config, padded_vocab_size, initializer, execution)
        self.layers = nn.ModuleList(
            TransformerLayer(config, number, initializer) for number in range(1, config.num_layers + 1)
        )
        tied_weight = None if config.untie_embeddings_and_output_weights else self.embedding.word_embeddings.weight
        self.head = LanguageModelHead(config, padded_vocab_size, initializer, execution, tied_weight)
