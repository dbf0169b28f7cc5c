"""Tiny transformers models of the families of tests.families, with random weights; their results in fp64."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.families import FAMILIES

VOCAB, LENGTH, BATCH = 61, 23, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
TINY = [family.model_type for family in FAMILIES if family.tiny is not None]


def config_of(family: str, **changes: Any) -> Any:
    """The configuration of a family's tiny model; with "-tied" after the name, of one with tied embeddings."""
    model_type = family.removesuffix("-tied")
    differences = next(each.tiny for each in FAMILIES if each.model_type == model_type)
    assert differences is not None, f"{model_type} has no tiny model in tests/families.py"
    tied = {"tie_word_embeddings": True} if model_type != family else {}
    config = CONFIG_MAPPING[model_type](**{**SIZES, **differences, **tied, **changes})
    config._experts_implementation = "eager"
    return config


def build(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model with random weights, the same for every call."""
    torch.manual_seed(0)
    config = config_of(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name or "embed_scale" in name:
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(1.2 * values * tensor.shape[-1] ** -0.5)
            else:
                tensor.copy_(0.1 * values + (1.0 if "norm" in name and "bias" not in name else 0.0))
    return model.to(dtype)


def inputs(length: int = LENGTH, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, mask and positions, [B, S] each; a third of the tokens masked."""
    generator = torch.Generator().manual_seed(11)
    tokens, labels = torch.randint(3, VOCAB, (2, batch, length), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) < 0.7).double()
    return tokens, labels, mask, torch.arange(length).expand(batch, length)


def eager_loss(model: Any, tokens: Tensor, labels: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """The sum of the masked token losses as transformers computes it, everything whole."""
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()


def results(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter by its name."""
    model.zero_grad()
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error, and where it is. A gradient that is zero but for rounding counts as none."""
    assert got.keys() == want.keys()
    floor = 1e-4 * max(float(w.norm()) for w in want.values())
    errors = {name: float((got[name] - w).norm() / w.norm().clamp_min(floor)) for name, w in want.items()}
    name = max(errors, key=lambda each: errors[each])
    return errors[name], name
