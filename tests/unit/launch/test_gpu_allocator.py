import pytest

from megatron.launch.gpu_allocator import NAMES, use_expandable_segments


def test_segments_grow_by_default():
    environment = {}
    use_expandable_segments(environment)
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_decides(name):
    environment = {name: "backend:cudaMallocAsync"}
    use_expandable_segments(environment)
    assert environment == {name: "backend:cudaMallocAsync"}
