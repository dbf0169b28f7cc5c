"""Proof, at start, that a Hugging Face model trains here as it does in transformers.

A small copy of the model, with random weights under which every setting matters, runs whole with transformers' own
eager attention, and as a stream of uneven chunks. In double precision the loss and the gradient of every parameter must
be equal up to rounding, with one document and with several.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron.config.errors import ConfigError
from megatron.core.documents import Documents
from megatron.core.parallel_state import ParallelState
from megatron.hf.building import build_hugging_face_model
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.fixed_rope import fix_rope
from megatron.hf.float64 import float64_stays
from megatron.hf.refusals import refusal, refuse
from megatron.hf.routing import AuxiliaryLoss
from megatron.hf.shrinking import shrink
from megatron.hf.structure import refuse_structure
from megatron.model.builder import Execution

TOLERANCE = 1e-9
SMALLEST_SHARE = 1e-6  # of the largest gradient's norm: smaller gradients are compared with this (key biases have none)
NUM_TOKENS = 61
CHUNK_SIZE = 16  # the last chunk is shorter
SLICE_LENGTH = 5
DOCUMENTS = (23, 2, 17, 1, 18)
IGNORED = -100


class WrongGradientError(ConfigError):
    """A small copy of the model trains otherwise here than in transformers."""


@dataclass(frozen=True)
class Sample:
    """One sequence: tokens, labels and positions [1, S], and the lengths of its documents."""

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    documents: Sequence[int]

    @property
    def num_labels(self) -> Tensor:
        return (self.labels_BS != IGNORED).sum()


@dataclass(frozen=True)
class Outcome:
    """The mean loss over the labels, and the gradient of every parameter that has one, by name."""

    loss: Tensor
    gradients: dict[str, Tensor | None]


@dataclass(frozen=True)
class Agreement:
    """Relative errors of a stream's loss, and of the gradient that differs most from that of transformers."""

    family: str
    loss: float
    gradient: float
    parameter: str
    seconds: float

    @property
    def line(self) -> str:
        return (
            f"a small copy of {self.family} against transformers in {self.seconds:.1f} s: "
            f"loss equal to {self.loss:.0e}, gradients to {self.gradient:.0e}"
        )


def prove(config: PretrainedConfig) -> Agreement:
    """Compare a small copy, streamed, with transformers on the CPU; it takes seconds.

    ConfigError if the model cannot be streamed, or if the loss or a gradient is wrong.
    """
    started = time.monotonic()
    try:
        refuse(config)
        with torch.random.fork_rng(devices=[]):  # weights are drawn
            small = shrink(config)
            small._experts_implementation = "eager"  # grouped products are not offered in double precision
            refuse_structure(small)
            found = [prove_with(small, documents) for documents in ((NUM_TOKENS,), DOCUMENTS)]
    except ConfigError:
        raise
    except UnsupportedModelError as error:
        raise refusal(config, str(error)) from error
    except Exception as error:  # whatever a model's own code stumbles over
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}, in {Path(place.filename).name}:{place.lineno}"
        raise refusal(config, f"a small copy of it does not run ({what})") from error
    return replace(max(found, key=lambda each: each.gradient), seconds=time.monotonic() - started)


def prove_with(small: PretrainedConfig, documents: Sequence[int]) -> Agreement:
    """Compare a small copy on one sequence of documents of these lengths. WrongGradientError if the results differ."""
    sample = random_sample(small, documents)
    with float64_stays():
        model, other = (random_model(small) for _ in range(2))
        fix_rope(other, NUM_TOKENS)
        if len(documents) > 1:
            fix_rope(model, NUM_TOKENS)  # documents get the frequencies of the whole sequence
        wanted = whole(model, sample)
        if not wanted.loss.isfinite():
            raise refusal(small, f"a small copy of it gives a loss of {float(wanted.loss)}, and cannot be compared")
        found = compare(small.model_type, wanted, streamed(other, sample))
    check(found, documents)
    return found


def random_model(small: PretrainedConfig) -> nn.Module:
    """Build the small copy in double precision, with weights, norms, biases, sinks and corrections that all matter."""
    model: nn.Module = AutoModelForCausalLM.from_config(small, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(values * 1.2 * tensor.shape[-1] ** -0.5)
            else:
                tensor.copy_(values * 0.1 + (1.0 if "norm" in name and "bias" not in name else 0.0))
    return model.double().train()


def random_sample(small: PretrainedConfig, documents: Sequence[int]) -> Sample:
    """Draw one sequence, in which positions restart with every document and some labels count for nothing."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = small.get_text_config().vocab_size
    tokens, labels = (torch.randint(vocabulary, (1, NUM_TOKENS), generator=generator) for _ in range(2))
    labels[:, ::7] = IGNORED
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    return Sample(tokens, labels, positions, documents)


def whole(model: nn.Module, sample: Sample) -> Outcome:
    """Run transformers' own code, document by document, which needs no mask for them."""
    pieces = (tensor.split(list(sample.documents), 1) for tensor in (sample.tokens_BS, sample.positions_BS))
    loss = torch.zeros((), dtype=torch.float64)
    routed = []
    for tokens, positions, labels in zip(*pieces, sample.labels_BS.split(list(sample.documents), 1), strict=True):
        output = model(input_ids=tokens, position_ids=positions, use_cache=False)
        loss = loss + functional.cross_entropy(output.logits[0], labels[0], ignore_index=IGNORED, reduction="sum")
        routed.append(getattr(output, "router_logits", None) or ())
    loss = loss / sample.num_labels
    (loss + auxiliary_loss(model, [torch.cat(layer) for layer in zip(*routed, strict=True)])).backward()
    return outcome(model, loss)


def auxiliary_loss(model: Any, router_logits_TE: Sequence[Tensor]) -> Tensor | float:
    """Return the loss by which a model's settings balance its experts, from the logits of each layer.

    transformers counts in single precision. Its function is compared with the formula where the stream is built.
    """
    if not router_logits_TE or not getattr(model, "router_aux_loss_coef", 0):
        return 0.0
    loss = AuxiliaryLoss(model.router_aux_loss_coef, model.num_experts, model.num_experts_per_tok)
    p = torch.cat(list(router_logits_TE)).softmax(-1)
    return loss.coefficient * loss.value(loss.chosen(p), p.sum(0), torch.tensor(len(p)))


def streamed(model: nn.Module, sample: Sample) -> Outcome:
    """Run the model chunk by chunk, and each chunk slice by slice."""
    execution = Execution(fpdt=True, chunk_size=CHUNK_SIZE, slice_length=SLICE_LENGTH, documents=True)
    stream: nn.Module = build_hugging_face_model(model, ParallelState(), execution)
    starts = [0, *accumulate(sample.documents[:-1])]
    documents = Documents.from_starts([starts], NUM_TOKENS)
    counted = sample.labels_BS != IGNORED
    inputs = (sample.tokens_BS, sample.labels_BS.clamp_min(0), counted, sample.positions_BS)
    loss = stream(*inputs, documents if len(starts) > 1 else None) / sample.num_labels
    loss.backward()
    return outcome(model, loss)


def outcome(model: nn.Module, loss: Tensor) -> Outcome:
    """Return the loss with the gradients that its backward pass has left."""
    return Outcome(loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()})


def compare(family: str, wanted: Outcome, got: Outcome) -> Agreement:
    """Return the relative errors of the loss and of the gradient that differs most: nan if one is not finite."""
    norms = {name: float(gradient.norm()) for name, gradient in wanted.gradients.items() if gradient is not None}
    floor = SMALLEST_SHARE * max(norms.values())
    errors = {}
    for name, want in wanted.gradients.items():
        have = got.gradients[name]
        zero = torch.zeros((), dtype=torch.float64)
        difference = (zero if have is None else have) - (zero if want is None else want)
        errors[name] = float(difference.norm()) / max(norms.get(name, 0.0), floor)
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    loss = abs(float((got.loss - wanted.loss) / wanted.loss))
    return Agreement(family, loss, errors[worst], worst, 0.0)


def check(found: Agreement, documents: Sequence[int]) -> None:
    """ConfigError unless a stream and transformers agree up to rounding."""
    if found.loss <= TOLERANCE and found.gradient <= TOLERANCE:
        return
    packed = f"{len(documents)} documents" if len(documents) > 1 else "one document"
    raise WrongGradientError(
        f"the Hugging Face model ({found.family}) trains otherwise here than in transformers: for a small copy and "
        f"{packed} the loss differs by {found.loss:.0e} of itself, and the gradient of {found.parameter} by "
        f"{found.gradient:.0e}; {TOLERANCE:.0e} is allowed. The run would be wrong, so it does not start; train this "
        "model with transformers itself, and report its config.json as a fault of this program"
    )
