"""A Hugging Face folder goes into ZeRO's shards and out of them, live and from a checkpoint, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron.arguments import parse_args
from megatron.weights.published_config import PUBLISHED_FILE
from megatron.weights.safetensors_folder import SafetensorsFolder
from tests.distributed.hugging_face_case import TAG, Job, load_and_write
from tests.distributed.rank_pool import RankPool
from tests.unit.hf.published_models import published
from tests.unit.tools.tool import run_tool

# Tied embeddings; stacks of experts; buffers that are saved.
FAMILIES = ("llama", "qwen3_moe", "deepseek_v3")


def assert_same(folder: Path, want: Path, dtype: torch.dtype) -> None:
    ours, theirs = SafetensorsFolder(folder), SafetensorsFolder(want)
    assert ours.names == theirs.names
    for name in theirs.names:
        assert torch.equal(ours.get(name).float(), theirs.get(name).float()), name
    assert ours.dtype("model.embed_tokens.weight") == dtype


@pytest.mark.parametrize(
    "num_ranks, zero_stage, bf16", [(1, 0, False), (2, 3, True), pytest.param(2, 1, True, marks=pytest.mark.slow)]
)
def test_a_folder_comes_back_from_an_engine_and_from_its_checkpoint(
    num_ranks: int, zero_stage: int, bf16: bool, tmp_path: Path
) -> None:
    dtype, jobs = torch.bfloat16 if bf16 else torch.float32, []
    for family in FAMILIES:
        source, out = tmp_path / f"{family}-source", tmp_path / family
        published(family, source, dtype)
        (source / "tokenizer.json").write_text("{}")
        jobs.append(Job(family, zero_stage, bf16, source, out))
    with RankPool() as pool:
        errors = pool.run(load_and_write, jobs, num_ranks=num_ranks)
    for number, job in enumerate(jobs):
        assert_same(job.out / "folder", job.source, dtype)
        assert (job.out / "folder" / "tokenizer.json").is_file()
        for again, full in (of_rank[number] for of_rank in errors):
            assert "exists and is not an empty folder" in again
            assert "cannot be written: No space left on device" in full
        assert not list(job.out.glob("full*"))
        checkpoint = job.out / TAG
        shutil.copyfile(job.source / "config.json", checkpoint / PUBLISHED_FILE)
        config = parse_args(["--hf-model", str(job.source), "--seq-length", "32", "--lr", "1e-4", "--train-iters", "1"])
        (checkpoint / "config.json").write_text(json.dumps(config.to_dict()))
        assert run_tool("hf2megads_weight_converter", "to-hf", checkpoint, job.out / "converted") == 0
        assert_same(job.out / "converted", job.source, torch.float32)
        assert (job.out / "converted" / "tokenizer.json").is_file()
        assert run_tool("consolidate_checkpoint", checkpoint, job.out / "portable", "--dtype", "bf16") == 0
        assert run_tool("hf2megads_weight_converter", "to-hf", job.out / "portable", job.out / "again") == 0
        if bf16:
            assert_same(job.out / "again", job.source, torch.bfloat16)
