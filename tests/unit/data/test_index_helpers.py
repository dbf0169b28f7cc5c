import numpy as np
import pytest

from megatron.data import index_helpers
from megatron.data.index_helpers import (
    build_blending_indices,
    build_sample_index,
    compiled_helpers,
    numpy_blending_indices,
    numpy_sample_index,
)

needs_compiled = pytest.mark.skipif(compiled_helpers() is None, reason="the C++ helper is not built")


def random_documents(seed: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 9, size=20).astype(np.int32)
    num_epochs = int(random.integers(1, 5))
    document_index = np.concatenate([random.permutation(20) for _ in range(num_epochs)])
    return sizes, document_index, num_epochs, int(sizes.sum())


@pytest.mark.parametrize("seed", range(20))
def test_samples_cut_the_concatenated_documents(seed: int) -> None:
    sizes, document_index, num_epochs, tokens_per_epoch = random_documents(seed)
    stream = [(p, k) for p, document in enumerate(document_index) for k in range(sizes[document])]
    for seq_length in (1, 2, 7, 30):
        index = build_sample_index(sizes, document_index, seq_length, num_epochs, tokens_per_epoch)
        assert len(index) == (len(stream) - 1) // seq_length + 1
        assert index[0].tolist() == [0, 0]
        assert [tuple(row) for row in index[1:].tolist()] == stream[seq_length::seq_length][: len(index) - 1]


@needs_compiled
@pytest.mark.parametrize("seed", range(20))
def test_compiled_and_numpy_sample_indices_are_equal(seed: int) -> None:
    sizes, document_index, num_epochs, tokens_per_epoch = random_documents(seed)
    for seq_length in (1, 3, 16, 1000):
        arguments = (sizes, document_index, seq_length, num_epochs, tokens_per_epoch)
        compiled = compiled_helpers().build_sample_index(*arguments)
        assert compiled.dtype == np.int64
        np.testing.assert_array_equal(compiled, numpy_sample_index(*arguments))


@needs_compiled
@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3], [0.999, 0.001]])
def test_compiled_and_numpy_blends_are_equal(weights: list[float]) -> None:
    compiled = compiled_helpers().build_blending_indices(np.array(weights), 3000)
    for one, other in zip(compiled, numpy_blending_indices(np.array(weights), 3000), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("build", [build_sample_index, numpy_sample_index])
def test_positions_beyond_32_bits_are_exact(build: type(build_sample_index)) -> None:  # type: ignore[valid-type]
    sizes = np.array([2**40, 3], dtype=np.int64)
    index = build(sizes, np.array([0, 1]), 2**39, 1, 2**40 + 3)
    assert index.tolist() == [[0, 0], [0, 2**39], [1, 0]]


@pytest.mark.parametrize("build", [build_sample_index, numpy_sample_index])
def test_a_wrong_token_count_is_an_error_and_not_a_stray_read(build: type(build_sample_index)) -> None:  # type: ignore[valid-type]
    with pytest.raises(ValueError, match="ends before the last sample"):
        build(np.array([5, 5]), np.array([0, 1]), 4, 1, 100)


def test_every_prefix_of_a_blend_follows_the_weights() -> None:
    weights = np.array([0.2, 0.3, 0.5])
    dataset_index, sample_index = build_blending_indices(weights, 1000)
    counts = np.cumsum(dataset_index[:, None] == np.arange(3), axis=0)
    assert np.abs(counts - weights * np.arange(1, 1001)[:, None]).max() <= 1
    for dataset in range(3):
        drawn = sample_index[dataset_index == dataset]
        np.testing.assert_array_equal(drawn, np.arange(len(drawn)))


def test_a_larger_blend_begins_with_the_smaller_one() -> None:
    weights = np.array([0.3, 0.7])
    np.testing.assert_array_equal(
        build_blending_indices(weights, 500)[0][:100], build_blending_indices(weights, 100)[0]
    )


def test_numpy_is_the_fallback_without_compiled_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_helpers, "compiled_helpers", lambda: None)
    assert build_sample_index(np.array([5]), np.array([0]), 2, 1, 5).tolist() == [[0, 0], [0, 2], [0, 4]]
    assert build_blending_indices(np.array([1.0]), 2)[1].tolist() == [0, 1]
