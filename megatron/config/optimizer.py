"""Settings for Adam and the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rate."""

    lr: float
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at which the decay ends."""

    lr_decay_style: DecayStyle = "linear"
    """Shape of the learning rate after warm-up. WSD stays at the peak and decays at the end. inverse-square-root is
    --lr x sqrt(warm-up / progress); without a warm-up it is that of one iteration: --lr / sqrt(iteration)."""

    lr_decay_iters: int | None = None
    """Iterations until the decay ends, including the warm-up. Default: the end of training."""

    lr_decay_samples: int | None = None
    """Samples until the decay ends."""

    lr_decay_tokens: int | None = None
    """Tokens until the decay ends."""

    lr_warmup_iters: int | None = None
    """Iterations of linear warm-up. Default: none."""

    lr_warmup_samples: int | None = None
    """Samples of linear warm-up."""

    lr_warmup_tokens: int | None = None
    """Tokens of linear warm-up."""

    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the decay length."""

    lr_warmup_init: float = 0.0
    """Learning rate at which the warm-up starts."""

    lr_wsd_decay_style: WsdDecayStyle = "exponential"
    """Shape of WSD's final decay."""

    lr_wsd_decay_iters: int | None = None
    """Iterations of WSD's final decay."""

    lr_wsd_decay_samples: int | None = None
    """Samples of WSD's final decay."""

    lr_wsd_decay_tokens: int | None = None
    """Tokens of WSD's final decay."""

    weight_decay: float = 0.01
    """AdamW weight decay; biases and norms have none."""

    clip_grad: float = 1.0
    """Clip gradients to this global norm; 0 does not clip."""

    adam_beta1: float = 0.9
    """Adam's beta1: decay rate of the mean of gradients."""

    adam_beta2: float = 0.999
    """Adam's beta2: decay rate of the mean of squared gradients."""

    adam_eps: float = 1e-8
    """Adam's epsilon: added to the square root in the denominator."""
