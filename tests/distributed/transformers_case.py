"""A tiny transformers model in DeepSpeed engines, trained, evaluated, saved and resumed; and by transformers alone.

DeepSpeed keeps process groups for the life of a process, so each call needs ranks of its own (a fresh RankPool), in
which many engines live one after another.
"""

import os
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config import AdaptersConfig, OptimizerConfig, Recompute
from megatron.core.documents import Documents
from megatron.core.parallel_state import ParallelState
from megatron.core.sequence_layout import SequenceLayout
from megatron.engine.engine import Engine, whole_parameters
from megatron.hf.adapters import add_adapters
from megatron.hf.building import build_hugging_face_model
from megatron.hf.materialization import empty_model, materialize
from megatron.hf.model import UNITS
from megatron.hf.quantization import quantize_base
from megatron.model.builder import Execution
from megatron.model.initialization import Initialization
from megatron.optimizer.param_groups import parameter_groups
from megatron.weights.opening import open_state
from tests.unit.hf.tiny_models import VOCAB, config_of, eager_loss

LENGTH, CHUNK, LEARNING_RATE, WEIGHT_DECAY, NUM_STEPS, TAG = 40, 16, 1e-2, 0.1, 4, "global_step2"
OPTIMIZER = OptimizerConfig(lr=LEARNING_RATE, adam_eps=1e-3)
INITIALIZATION = Initialization(torch.float32, torch.device("cpu"), seed=3)


@dataclass(frozen=True)
class Case:
    """How a model of a family is trained. The ranks that share no sequence have samples of their own."""

    family: str
    zero_stage: int
    num_ranks: int = 2
    sequence_parallel_size: int = 1
    offloading: bool = False
    fpdt: bool = True
    adapters: AdaptersConfig | None = None
    bf16: bool = False
    balance: float = 0.0
    """Coefficient of the routers' auxiliary loss."""

    recomputed: int = 0
    """Blocks that are recomputed together, with attention; 0: attention is not recomputed."""

    chunk_size: int = CHUNK
    documents: tuple[int, ...] = (LENGTH,)
    """Lengths of the documents of each sequence."""

    def __str__(self) -> str:
        execution = ("offloaded" if self.offloading else "fpdt" if self.fpdt else "plain") + "-bf16" * self.bf16
        execution += f"-recomputed{self.recomputed}" if self.recomputed else ""
        family = f"{self.family}-balanced" if self.balance else self.family
        family += "-nf4" if self.adapters and self.adapters.quantize_base else ""
        execution += f"-chunk{self.chunk_size}" * (self.chunk_size != CHUNK) + "-documents" * (len(self.documents) > 1)
        return f"{family}-zero{self.zero_stage}-{self.num_ranks}ranks-sp{self.sequence_parallel_size}-{execution}"

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        asked = {"output_router_logits": True, "router_aux_loss_coef": self.balance} if self.balance else {}
        return config_of(self.family, **asked)

    @property
    def num_samples(self) -> int:
        return self.num_ranks // self.sequence_parallel_size


@dataclass(frozen=True)
class Trained:
    """Losses and gradient norms of the steps, the evaluated loss at the end, and the weights by name."""

    losses: list[float]
    norms: list[float]
    evaluated: float
    weights: dict[str, Tensor]


def batch_of(
    step: int, num_samples: int, documents: tuple[int, ...] = (LENGTH,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, mask and positions of one step, [samples, S]."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens, labels = torch.randint(3, VOCAB, (2, num_samples, LENGTH), generator=generator)
    mask = (torch.rand(num_samples, LENGTH, generator=generator) < 0.7).float()
    return tokens, labels, mask, torch.cat([torch.arange(n) for n in documents]).expand(num_samples, LENGTH)


def build(case: Case) -> tuple[Engine, ParallelState]:
    """Return an engine over every rank of this process's world."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    parallel_state = ParallelState.create(case.sequence_parallel_size)
    execution = Execution(
        fpdt=case.fpdt,
        chunk_size=case.chunk_size,
        offloading=case.offloading,
        slice_length=5,
        documents=len(case.documents) > 1,
        recompute=Recompute.ATTENTION if case.recomputed else Recompute.ALL,
        checkpoint_interval=case.recomputed or 1,
        whole_parameters=whole_parameters,
    )
    model = empty_model(case.config, torch.float32)
    if case.adapters is not None:
        add_adapters(model, case.adapters)
        if case.adapters.quantize_base is not None:
            quantize_base(model)

    def provide() -> Any:
        materialize(model, INITIALIZATION, random=case.adapters is None)
        return build_hugging_face_model(model, parallel_state, execution)

    # So small a model would never be released between forward and backward pass.
    tight = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    zero = {
        "stage": case.zero_stage,
        **({**tight, "stage3_param_persistence_threshold": 0} if case.zero_stage == 3 else {}),
    }
    settings = {
        "train_batch_size": case.num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": case.bf16},
    }
    groups = lambda each: parameter_groups(each, WEIGHT_DECAY)  # noqa: E731
    return Engine(provide, UNITS, groups, OPTIMIZER, settings, torch.device("cpu")), parallel_state


def local_batch(case: Case, state: ParallelState, step: int) -> tuple[list[Any], Tensor]:
    """Return this rank's inputs of a step, and the number of unmasked tokens of all ranks."""
    layout = SequenceLayout(LENGTH, case.chunk_size if case.fpdt else LENGTH, case.sequence_parallel_size)
    owned, row = layout.owned_positions(state.sequence_parallel_rank), state.data_parallel_rank
    batch = batch_of(step, case.num_samples, case.documents)
    starts = [0, *accumulate(case.documents[:-1])]
    documents = Documents.from_starts([starts], LENGTH) if len(starts) > 1 else None
    return [*(t[row : row + 1, owned].contiguous() for t in batch), documents], batch[2].sum()


def steps(case: Case, engine: Engine, state: ParallelState, numbers: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in numbers:
        inputs, num_tokens = local_batch(case, state, step)
        loss = engine.train_step([inputs], num_tokens, LEARNING_RATE)
        dist.all_reduce(loss)
        losses.append(float(loss / num_tokens))
        norms.append(engine.gradient_norm() or 0.0)
    return losses, norms


def finished(case: Case, engine: Engine, state: ParallelState, losses: list[float], norms: list[float]) -> Trained:
    inputs, num_tokens = local_batch(case, state, NUM_STEPS)
    loss = engine.evaluate(inputs)
    dist.all_reduce(loss)
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with whole_parameters([parameter]):
            weights[name] = parameter.detach().clone()
    return Trained(losses, norms, float(loss / num_tokens), weights)


def train(cases: list[Case], folder: Path | None) -> list[Trained]:
    """Train each case; half-way, save a checkpoint in FOLDER/CASE, if a folder is given."""
    results = []
    for case in cases:
        engine, state = build(case)
        first = steps(case, engine, state, range(NUM_STEPS // 2))
        if folder is not None:
            engine.save(folder / str(case), TAG)
        second = steps(case, engine, state, range(NUM_STEPS // 2, NUM_STEPS))
        results.append(finished(case, engine, state, *(a + b for a, b in zip(first, second, strict=True))))
    return results


def resume(cases: list[tuple[Path, Case]]) -> list[Trained]:
    """Train each case from a checkpoint that another may have saved half-way."""
    results = []
    for path, case in cases:
        engine, state = build(case)
        engine.load_state(open_state(path / TAG), with_optimizer=True)
        results.append(finished(case, engine, state, *steps(case, engine, state, range(NUM_STEPS // 2, NUM_STEPS))))
    return results


def train_and_resume(
    saved: list[Case], others: list[Case], resumed: list[tuple[Path, Case]], folder: Path
) -> tuple[list[Trained], list[Trained]]:
    """Train all cases, with checkpoints of those `saved` in FOLDER, and resume some of these."""
    return train(saved, folder) + train(others, None), resume(resumed)


def transformers_alone(case: Case) -> Trained:
    """Train in one process, everything whole, by transformers and torch."""
    model: Any = empty_model(case.config, torch.float32)
    materialize(model, replace(INITIALIZATION), random=True)
    model.set_attn_implementation("eager")
    return train_alone(case, model)


def train_alone(case: Case, model: Any) -> Trained:
    """Train a transformers model in one process, everything whole, by transformers and torch."""
    model.train()
    groups = parameter_groups(model, WEIGHT_DECAY)
    adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2), eps=1e-3)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batch = batch_of(step, case.num_samples, case.documents)
        loss = loss_of_documents(case, model, batch)
        balance = case.balance * model(input_ids=batch[0]).aux_loss if case.balance else torch.zeros(())
        adam.zero_grad()
        (loss + balance).backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        adam.step()
    with torch.no_grad():
        batch = batch_of(NUM_STEPS, case.num_samples, case.documents)
        evaluated = float(loss_of_documents(case, model.eval(), batch))
    return Trained(losses, norms, evaluated, {name: p.detach() for name, p in model.named_parameters()})


def loss_of_documents(case: Case, model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the mean loss as transformers computes it, document by document."""
    pieces = zip(*(tensor.split(case.documents, 1) for tensor in batch), strict=True)
    return torch.stack([eager_loss(model, *piece) for piece in pieces]).sum() / batch[2].sum()
