"""Index builders: those of helpers.cpp if it was compiled, otherwise numpy ones with equal results."""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_BLENDED_DATASETS = 2**15 - 1


@cache
def compiled_helpers() -> ModuleType | None:
    """Return the compiled module, or None if it was not built."""
    try:
        return importlib.import_module("megatron.data._helpers")
    except ImportError:
        return None


def build_sample_index(
    sizes: npt.NDArray[Any],
    document_index: npt.NDArray[np.int64],
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
) -> npt.NDArray[np.int64]:
    """Cut the documents, concatenated in order, into samples of seq_length + 1 tokens that overlap by one.

    sizes: tokens per document. document_index: documents in the order they are read, all epochs.
    Returns int64 [num_samples + 1, 2] with num_samples = (num_epochs * tokens_per_epoch - 1) // seq_length: row s is
    the position in document_index, and the offset in that document, of sample s's first token, which is also the
    last token of sample s - 1. Raises ValueError if the documents hold fewer tokens than said.
    """
    helpers = compiled_helpers()
    build = helpers.build_sample_index if helpers else numpy_sample_index
    result: npt.NDArray[np.int64] = build(sizes, document_index, seq_length, num_epochs, tokens_per_epoch)
    return result


def build_blending_indices(
    weights: npt.NDArray[np.float64], size: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Interleave datasets so that after any number of samples each has its share to within about one sample.

    weights: float64 [num_datasets], summing to 1. Returns (int16 [size] dataset, int64 [size] sample of that dataset);
    a larger `size` only appends.
    """
    helpers = compiled_helpers()
    build = helpers.build_blending_indices if helpers else numpy_blending_indices
    dataset_index, sample_index = build(weights, size)
    return dataset_index, sample_index


def numpy_sample_index(
    sizes: npt.NDArray[Any],
    document_index: npt.NDArray[np.int64],
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
) -> npt.NDArray[np.int64]:
    """Do the same as `build_sample_index`, without a compiler."""
    if seq_length < 1:
        raise ValueError("seq_length must be at least 1")
    num_samples = max(0, num_epochs * tokens_per_epoch - 1) // seq_length
    result = np.zeros((num_samples + 1, 2), dtype=np.int64)
    first_tokens = np.arange(1, num_samples + 1, dtype=np.int64) * seq_length
    document_ends = np.cumsum(np.asarray(sizes, dtype=np.int64)[document_index])
    if num_samples and (len(document_ends) == 0 or first_tokens[-1] >= document_ends[-1]):
        raise ValueError("document_index ends before the last sample")
    positions = np.searchsorted(document_ends, first_tokens, side="right")
    document_starts = np.concatenate(([0], document_ends[:-1]))
    result[1:, 0] = positions
    result[1:, 1] = first_tokens - document_starts[positions]
    return result


def numpy_blending_indices(
    weights: npt.NDArray[np.float64], size: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Do the same as `build_blending_indices`, without a compiler."""
    weights = np.asarray(weights, dtype=np.float64)
    if not 1 <= len(weights) <= MAX_BLENDED_DATASETS:
        raise ValueError(f"1 to {MAX_BLENDED_DATASETS} weights are allowed")
    dataset_index = np.empty(size, dtype=np.int16)
    sample_index = np.empty(size, dtype=np.int64)
    taken = np.zeros(len(weights), dtype=np.int64)
    for step in range(size):
        chosen = int(np.argmax(weights * (step + 1) - taken))
        dataset_index[step] = chosen
        sample_index[step] = taken[chosen]
        taken[chosen] += 1
    return dataset_index, sample_index
