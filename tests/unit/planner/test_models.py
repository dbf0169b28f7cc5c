"""Published models by name, against the parameters that their publishers state."""

import pytest

from megatron.hf.settings import model_of_config
from megatron.planner.job import Job
from megatron.planner.models import published_config


@pytest.mark.parametrize(
    "name, billions",
    [
        ("meta-llama/Llama-3.2-1B-Instruct", 1.236),
        ("meta-llama/Meta-Llama-3-8B", 8.030),
        ("qwen3-0.6b", 0.596),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.544),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", 30.53),
        ("openai/gpt-oss-20b", 20.91),
    ],
)
def test_published_models_have_their_parameters(name, billions):
    model = model_of_config(published_config(name), name, 2**17)
    job = Job(model, model.embedding_rows, 1, 2**15, 1)
    assert job.num_parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_another_name_is_none():
    assert published_config("Llama-3.1-9B") is None
