"""Cross-entropy of a tile of logits, in log-sum-exp form, fused with its gradient.

loss    = sum over tokens of mask * (logsumexp(z) - z[label])
dlogits = mask * (softmax(z) - onehot(label))
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.fused import fused


@fused
def token_losses(logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor:
    """Compute the masked token losses [T], in the dtype of the mask."""
    logits = logits_TV.to(mask_T.dtype)
    return (logits.logsumexp(-1) - _at_labels(logits, labels_T)) * mask_T


@fused
def cross_entropy_with_gradient(logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the sum of the masked token losses, a scalar, and its dlogits [T, V] in the dtype of the logits."""
    logits = logits_TV.to(mask_T.dtype)
    lse_T = logits.logsumexp(-1)
    loss = ((lse_T - _at_labels(logits, labels_T)) * mask_T).sum()
    is_label_TV = torch.arange(logits.shape[1], device=logits.device) == labels_T[:, None]
    dlogits = ((logits - lse_T[:, None]).exp() - is_label_TV.to(logits.dtype)) * mask_T[:, None]
    return loss, dlogits.to(logits_TV.dtype)


def _at_labels(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return logits_TV.gather(1, labels_T[:, None]).squeeze(1)
