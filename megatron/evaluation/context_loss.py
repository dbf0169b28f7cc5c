"""Loss by context length: the same tokens are scored with longer and longer contexts before them.

    document   . . . . . . . . . . . . . . . [scored]
    context    |<------------ 4096 --------->
                                |<-- 1024 -->

The loss of a model that uses its context falls with the length of the context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron.evaluation.errors import EvaluationError
from megatron.model.transformer import GPTModel


@dataclass(frozen=True)
class ContextLoss:
    """Mean loss of the scored tokens after one length of context."""

    context: int
    """Tokens before the first one that is scored."""
    loss: float
    """Nats per token."""
    num_tokens: int
    """Number of scored tokens in all documents."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def loss_by_context(
    model: GPTModel, documents: Iterable[Sequence[int]], contexts: Sequence[int], num_scored: int
) -> list[ContextLoss]:
    """Compute the mean loss by context length of `num_scored` tokens of each document, those after the longest context.

    Every forward pass is the model's own: chunk by chunk if it is built for FPDT. EvaluationError if a document is too
    short, or if there is none.
    """
    length = max(contexts) + num_scored
    sums, num_documents = dict.fromkeys(contexts, 0.0), 0
    for document in documents:
        if len(document) < length:
            raise EvaluationError(
                f"a document has {len(document)} tokens, and the longest context ({max(contexts)}) with "
                f"{num_scored} tokens behind it needs {length}; use shorter contexts or longer documents."
            )
        tokens = torch.tensor(document[:length], dtype=torch.int64)
        for context in contexts:
            sums[context] += _loss(model, tokens[-(context + num_scored) :], num_scored)
        num_documents += 1
    if not num_documents:
        raise EvaluationError(
            f"there are no documents of {length} tokens or more; use shorter contexts or longer documents."
        )
    num_tokens = num_documents * num_scored
    return [ContextLoss(context, sums[context] / num_tokens, num_tokens) for context in contexts]


@torch.no_grad()
def _loss(model: GPTModel, tokens_S: torch.Tensor, num_scored: int) -> float:
    """Compute the sum of the losses of the last tokens."""
    inputs_BS, labels_BS = tokens_S[None, :-1], tokens_S[None, 1:]
    mask_BS = torch.zeros(inputs_BS.shape)
    mask_BS[:, -num_scored:] = 1
    return float(model(inputs_BS, labels_BS, mask_BS, torch.arange(inputs_BS.shape[1])[None]))
