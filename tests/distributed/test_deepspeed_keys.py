"""With every key of the DeepSpeed JSON that could touch the arithmetic, the gradient is that of a run without it.

Adam divides by the size of the gradient, which hides a wrong scale; so its first moment and the norm are compared.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.engine_case import Layout, State, build, gather
from tests.distributed.rank_pool import RankPool
from tests.unit.config.commands import complaint

NUM_RANKS, NUM_MICROBATCHES = 2, 3
Stated = dict[str, Any]
Case = tuple[Layout, Stated]
Result = tuple[float, State]
Results = dict[str, Result]


def zero(**keys: Any) -> Stated:
    return {"zero_optimization": keys}


def at(stages: tuple[int, ...], stated: Stated, bf16: bool = False) -> list[Case]:
    return [(Layout(NUM_RANKS, stage, bf16), stated) for stage in stages]


REFERENCE: Case = (Layout(NUM_RANKS, 0), {})
PLAIN = at((1, 2, 3), {}, bf16=True)
CASES = [
    *at((0, 1), {"prescale_gradients": True}),
    *at((0, 1, 2), {"gradient_allreduce_op": "mean"}),
    *at((1, 2, 3), {"communication_data_type": "fp32"}, bf16=True),
    *at((2, 3), {"data_types": {"grad_accum_dtype": "fp32"}}, bf16=True),
    *at((1, 2), zero(round_robin_gradients=True)),
    *at((1, 2), zero(parameter_alignment=True)),
    *at((1, 2), zero(contiguous_gradients=False)),
    *at((1, 2), zero(elastic_checkpoint=True)),
    *at((1, 2), zero(use_multi_rank_bucket_allreduce=False)),
    *at((1, 2), zero(allgather_partitions=False)),
    *at((1, 2, 3), zero(reduce_bucket_size=40, allgather_bucket_size=40)),
    *at((1, 2, 3), zero(reduce_scatter=False)),
    *at((1, 2), zero(overlap_comm=True)),
    *at((3,), zero(overlap_comm=False)),
    *at((3,), zero(sub_group_size=20)),
    *at((3,), zero(stage3_param_persistence_threshold=0, stage3_max_live_parameters=50, stage3_max_reuse_distance=50)),
    *at((3,), zero(stage3_prefetch_bucket_size=0, stage3_model_persistence_threshold=0)),
    *at((3,), zero(stage3_use_all_reduce_for_fetch_params=True)),
    *at((3,), zero(stage3_allgather_sequential=True)),
    *at((3,), zero(memory_efficient_linear=False)),
    *at((3,), zero(enable_sanity_checks=True, ignore_unused_parameters=False)),
    *at((2,), {"bf16": {"check_grad_overflow": False}}, bf16=True),
]  # fmt: skip
# That the comparison finds a wrong scale.
DOUBLED: Case = (Layout(NUM_RANKS, 1), {"gradient_allreduce_op": "sum"})


def train(cases: list[Case]) -> list[Result]:
    """One step of a few micro-batches in each case: the gradient norm and the state after it."""
    results = []
    batch = {"train_batch_size": NUM_RANKS * NUM_MICROBATCHES, "gradient_accumulation_steps": NUM_MICROBATCHES}
    for layout, stated in cases:
        engine = build(layout, 1, batch | stated)
        generator = torch.Generator().manual_seed(dist.get_rank())
        batches = [[torch.randint(0, 11, (9,), generator=generator)] for _ in range(NUM_MICROBATCHES)]
        engine.train_step(batches, torch.tensor(8.0 * NUM_RANKS * NUM_MICROBATCHES), 1e-2)
        results.append((engine.gradient_norm() or 0.0, gather(engine)))
    return results


@pytest.fixture(scope="module")
def results() -> Results:
    cases = [REFERENCE, DOUBLED, *PLAIN, *CASES]
    with RankPool() as pool:
        return dict(zip(map(name_of, cases), pool.run(train, cases, num_ranks=2, timeout_seconds=400)[0], strict=True))


def name_of(case: Case) -> str:
    return f"{case[0]} {case[1]}"


def error_of(got: Result, want: Result) -> float:
    """The largest relative error of the norm or of a parameter's gradient."""
    (norm, state), (wanted_norm, wanted) = got, want
    errors = [abs(norm / wanted_norm - 1)]
    for name, parts in wanted.items():
        if "exp_avg" in parts:
            difference = state[name]["exp_avg"].float() - parts["exp_avg"]
            errors.append(float(difference.norm() / parts["exp_avg"].norm()))
    return max(errors)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_gradient_is_that_of_a_run_without_the_key(results: Results, case: Case) -> None:
    """In fp32 that of stage 0; in bf16, in which ZeRO-3 draws other weights, that of the same stage."""
    layout = case[0]
    reference = (layout, {}) if layout.bf16 else REFERENCE
    assert error_of(results[name_of(case)], results[name_of(reference)]) <= (2**-7 if layout.bf16 else 1e-6)


def test_the_configuration_lets_these_keys_pass(tmp_path: Path) -> None:
    for layout, stated in CASES:
        flags = f"--zero-stage {layout.zero_stage} {'--bf16' * layout.bf16}"
        (tmp_path / "ds.json").write_text(json.dumps(stated))
        assert complaint(f"--deepspeed-config {tmp_path / 'ds.json'} {flags}") == "", stated


def test_a_sum_over_the_ranks_is_found(results: Results) -> None:
    assert error_of(results[name_of(DOUBLED)], results[name_of(REFERENCE)]) == pytest.approx(1.0)
