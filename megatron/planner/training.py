"""Plan of a whole training run, whose steps may differ in length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron.fpdt.memory_model import saving_order
from megatron.planner.plan import Plan
from megatron.planner.solver import Open, fastest


@dataclass(frozen=True)
class Phase:
    """Steps of one length."""

    plan: Plan
    num_steps: int

    @property
    def seconds(self) -> float:
        return self.num_steps * self.plan.speed.step

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.plan.job.global_tokens


@dataclass(frozen=True)
class Training:
    """The phases of a run, or of what is left of it, in order; memory is that of the phase which needs most of it."""

    phases: tuple[Phase, ...]
    num_tokens: int

    @classmethod
    def of(cls, longest: Plan, shorter: Mapping[int, Plan], phases: Sequence[tuple[int, int]]) -> Training:
        """Return the run whose `phases` have a length and a number of steps each."""
        planned = tuple(Phase(shorter.get(length, longest), num_steps) for length, num_steps in phases)
        return cls(planned, sum(phase.num_tokens for phase in planned))

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def num_steps(self) -> int:
        return sum(phase.num_steps for phase in self.phases)

    @property
    def gpu_bytes(self) -> int:
        return max((phase.plan.memory.gpu_with_overhead for phase in self.phases), default=0)

    @property
    def host_bytes(self) -> int:
        return max((phase.plan.memory.host for phase in self.phases), default=0)


def shorter_plans(longest: Plan, choices: Open, lengths: Iterable[int]) -> dict[int, Plan]:
    """Plan steps of shorter lengths, the longest first, in the run and with the chunk of the `longest` plan.

    What the longest steps save, shorter ones may save in the same memory. More is saved where there is host memory left
    beside that, so that no step has to free the memory of another length.
    """
    host_left = max(longest.machines.host_bytes_per_gpu - longest.memory.host, 0)
    recompute, interval = longest.memory.recompute, longest.memory.checkpoint_interval
    plans = dict[int, Plan]()
    for length in lengths:
        plan = longest.with_job(longest.job.at(length, min(longest.job.chunk_length, length)))
        plan = fastest(plan, replace(choices, chunk=False, plain=False)) or plan
        needed, saved = plan.memory.host_chunks, saving_order(plan.memory.recompute, plan.memory.checkpoint_interval)
        if needed > host_left or saved < saving_order(recompute, interval):
            plan = plan.with_job(replace(plan.job, recompute=recompute, checkpoint_interval=interval))
        else:
            host_left -= needed
        plans[length] = plan
    return plans
