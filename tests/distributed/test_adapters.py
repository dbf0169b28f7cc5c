"""Under DeepSpeed, adapters train as peft trains them in one process, and nothing is stored for frozen weights."""

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron.config import AdaptersConfig
from megatron.hf.adapters import is_of_adapter
from tests.distributed.adapters_case import Outcome, peft_alone, sizes, train_and_resume
from tests.distributed.rank_pool import RankPool
from tests.distributed.transformers_case import NUM_STEPS, Case, Trained
from tests.unit.hf.tiny_models import build

LORA = AdaptersConfig(lora_rank=4)
DORA = AdaptersConfig(lora_rank=4, use_dora=True)
EXPERTS = AdaptersConfig(lora_rank=2, lora_target_modules=("q_proj", "v_proj", "experts.gate_up_proj"))
QLORA = AdaptersConfig(lora_rank=2, quantize_base="nf4")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
CASES = [
    Case("llama-tied", zero_stage=3, offloading=True, adapters=LORA),
    Case("llama-tied", zero_stage=1, sequence_parallel_size=2, adapters=LORA),
    Case("llama", zero_stage=3, sequence_parallel_size=2, fpdt=False, adapters=DORA),
    Case("qwen3_moe", zero_stage=3, adapters=EXPERTS, recomputed=2),
    Case("gpt2", zero_stage=0, adapters=DORA),
    *[Case("qwen3_moe", zero_stage=3, sequence_parallel_size=2, adapters=QLORA, recomputed=3)] * HAS_BITSANDBYTES,
    *[Case("llama-tied", zero_stage=1, offloading=True, adapters=QLORA)] * HAS_BITSANDBYTES,
]
IN_BF16 = [replace(case, bf16=True, fpdt=True, offloading=False) for case in (*CASES[:2], *CASES[5:6])]
RESUMED = [(CASES[0], CASES[0]), (CASES[0], CASES[1]), (CASES[1], CASES[0]), *((each, each) for each in CASES[4:6])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for family in {case.family for case in CASES}:
        build(family, torch.float32).save_pretrained(folder / "bases" / family)
    return folder


@pytest.fixture(scope="module")
def trained_and_resumed(folder: Path) -> tuple[list[Outcome], list[Trained]]:
    others = [
        (folder / str(saved), replace(other, sequence_parallel_size=saved.sequence_parallel_size))
        for saved, other in RESUMED
    ]
    with RankPool() as pool:
        arguments = CASES + IN_BF16, others, folder / "bases", folder
        return pool.run(train_and_resume, *arguments, num_ranks=2, timeout_seconds=300)[0]


@pytest.fixture(scope="module")
def outcomes(trained_and_resumed: tuple[list[Outcome], list[Trained]]) -> dict[Case, Outcome]:
    return dict(zip(CASES + IN_BF16, trained_and_resumed[0], strict=True))


@pytest.fixture(scope="module")
def alone(folder: Path):
    return cache(lambda case: peft_alone(case, folder / "bases" / case.family))


def assert_same(got: Trained, want: Trained, first: int = 0) -> None:
    assert got.losses == pytest.approx(want.losses[first:], rel=1e-5)
    assert got.norms == pytest.approx(want.norms[first:], rel=1e-4)
    assert got.evaluated == pytest.approx(want.evaluated, rel=1e-5)
    narrow = {name.removesuffix(".quantized") for name in got.weights}
    assert narrow == want.weights.keys()
    for name in got.weights.keys() & want.weights.keys():
        weight = want.weights[name]
        torch.testing.assert_close(got.weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_peft(outcomes, alone, case) -> None:
    assert_same(outcomes[case].trained, alone(replace(case, zero_stage=0)))
    assert len(set(outcomes[case].trained.losses)) == NUM_STEPS


def test_a_checkpoint_of_adapters_alone_is_resumed_at_any_stage(trained_and_resumed, outcomes, alone) -> None:
    for (saved, other), result in zip(RESUMED, trained_and_resumed[1], strict=True):
        assert_same(result, alone(replace(saved, zero_stage=0)), first=NUM_STEPS // 2)
        if saved == other:
            for name, weight in outcomes[saved].trained.weights.items():
                assert torch.equal(result.weights[name], weight), name
    for outcome in outcomes.values():
        assert outcome.saved
        assert all(is_of_adapter(name) for name in outcome.saved)


@pytest.mark.parametrize("case", IN_BF16, ids=str)
def test_frozen_weights_take_the_bytes_that_they_are_stored_in(outcomes, case) -> None:
    trained, frozen = sizes(outcomes[case].trained.weights)
    num_bytes = outcomes[case].num_bytes
    of_weights, of_states = num_bytes["weights", "cpu"], num_bytes["optimizer states", "cpu"]
    ranks = case.num_ranks if case.zero_stage == 3 else 1
    assert of_weights == pytest.approx((2 * trained + frozen) / ranks, rel=0.02)
    assert of_states == pytest.approx(12 * trained / case.num_ranks, rel=0.02)
