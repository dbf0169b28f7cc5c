"""Samples for a causal language model: seq_length + 1 consecutive tokens, across document ends.

Inputs are the first seq_length tokens of a sample and labels the last seq_length. Neighboring samples overlap by one
token, so every token is a label once per epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.sample_lengths import Phase
from megatron.data.blended_dataset import BlendedDataset, SampleDataset
from megatron.data.errors import DataError
from megatron.data.index_helpers import build_blending_indices
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.phased_dataset import PhasedDataset
from megatron.data.sample_order import OrderPlan, SampleOrder, build_order, cached_order, num_epochs_for
from megatron.data.splits import PART_NAMES, parse_data_paths, parse_split, split_documents
from megatron.data.tokens import read_pieces
from megatron.data.vocabulary import check_tokens


@dataclass(frozen=True, eq=False)
class StoredSample:
    """The tokens of a sample, in pieces of documents. A slice reads only the tokens it covers, in the file's dtype.

    Piece k begins at token `starts[k]` of the file and at `bounds[k]` of the sample; the last of `bounds` is its end.
    With `vocab_size` the tokens are checked when read: DataError, naming the sample by `name`, for one outside.
    """

    indexed: IndexedDataset
    starts: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]
    name: str
    vocab_size: int | None = None

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, span: slice) -> npt.NDArray[Any]:
        tokens = read_pieces(self.bounds, span, self._read_piece)
        if self.vocab_size is not None:
            check_tokens(tokens, self.vocab_size, self.name)
        return tokens

    def _read_piece(self, piece: int, start: int, stop: int) -> npt.NDArray[Any]:
        first = int(self.starts[piece])
        return self.indexed.get_tokens(first + start, first + stop)


@dataclass(frozen=True)
class SampleSettings:
    """How documents become samples, in an order determined by `seed`.

    With `cache_dir` the order is cached there. With `vocab_size` every token read is checked against it. `phases`
    are the first sample and the length of each phase of training data whose samples are not all of `seq_length`.

    In one phase, samples begin at `first_token` of the documents in their order. With `is_closed` they are shuffled
    without those that would follow, so that the next phase can begin where they end.
    """

    seq_length: int
    seed: int
    cache_dir: Path | None = None
    vocab_size: int | None = None
    phases: tuple[Phase, ...] = ()
    first_token: int = 0
    is_closed: bool = False


class GPTDataset:
    """`num_samples` samples of some documents of an indexed dataset.

    Sample i depends only on (documents, settings, i), and not on num_samples unless they are closed. Documents are read
    for as many epochs as needed. Without a `cache_dir` the order is computed each time. Raises DataError if the
    documents hold too few tokens or are not token ids.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        num_samples: int,
        name: str,
        settings: SampleSettings,
    ) -> None:
        self.name = name
        self.seq_length = seq_length = settings.seq_length
        self._indexed = indexed
        self._num_samples = num_samples
        self._vocab_size = settings.vocab_size
        num_tokens = _check_usable(indexed, documents, seq_length, name)
        first_token, closed = settings.first_token, num_samples if settings.is_closed else None
        num_epochs = num_epochs_for(num_samples, num_tokens, seq_length, first_token)
        plan = OrderPlan(indexed.document_sizes, documents, seq_length, settings.seed, num_epochs, first_token, closed)
        cache_dir = settings.cache_dir
        self._order: SampleOrder = cached_order(plan, cache_dir) if cache_dir else build_order(plan)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> StoredSample:
        """Return sample `index`, of seq_length + 1 tokens. Reads none of them: slicing the sample does."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self.name}, which has {self._num_samples}")
        row = int(self._order.shuffle_index[index])
        (first, start), (last, end) = self._order.sample_index[row : row + 2].tolist()
        documents = self._order.document_index[first : last + 1]
        starts, sizes = self._indexed.document_starts[documents], self._indexed.document_sizes[documents]
        sizes[-1] = end + 1
        starts[0] += start
        sizes[0] -= start
        bounds = np.concatenate(([0], np.cumsum(sizes)))
        name = f"sample {index} of the {self.name} part of {self._indexed.prefix}"
        return StoredSample(self._indexed, starts, bounds, name, self._vocab_size)


def build_datasets(
    data_paths: Sequence[str],
    split: str,
    num_samples: tuple[int, int, int],
    settings: SampleSettings,
) -> tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]:
    """Build the training, validation and test parts of one dataset, or of several blended by weight.

    data_paths: one prefix, or pairs of weight and prefix. split: such as "969,30,1". A part with num_samples 0 is None.
    A validation or test part whose share holds no document is None too.
    Sample orders are cached; by default in a folder PREFIX_cache next to each dataset, if writable.
    Raises DataError.
    """
    prefixes, weights = parse_data_paths(data_paths)
    sources = [IndexedDataset(prefix) for prefix in prefixes]
    shares = parse_split(split)
    ranges = [split_documents(source.num_documents, shares) for source in sources]
    wanted = {
        name: [part_ranges[k] for part_ranges in ranges]
        for k, name in enumerate(PART_NAMES)
        if num_samples[k] and (name == "train" or any(part_ranges[k] for part_ranges in ranges))
    }
    # All parts are checked before the order of any is computed and cached.
    for name, documents in wanted.items():
        counts = _samples_per_source(weights, num_samples[PART_NAMES.index(name)])
        for source, part, count in zip(sources, documents, counts, strict=True):
            if count:
                _check_usable(source, part, settings.seq_length, name)
    train, valid, test = (
        _build_part(sources, weights, wanted[name], num_samples[k], name, settings) if name in wanted else None
        for k, name in enumerate(PART_NAMES)
    )
    return train, valid, test


def build_dataset(
    data_paths: Sequence[str],
    name: str,
    num_samples: int,
    settings: SampleSettings,
) -> SampleDataset | None:
    """Build one part called `name` from all documents of `data_paths`, for parts that have files of their own.

    Otherwise as `build_datasets`.
    """
    prefixes, weights = parse_data_paths(data_paths)
    sources = [IndexedDataset(prefix) for prefix in prefixes]
    ranges = [range(source.num_documents) for source in sources]
    return _build_part(sources, weights, ranges, num_samples, name, settings)


def _build_part(
    sources: Sequence[IndexedDataset],
    weights: Sequence[float],
    ranges: Sequence[range],
    num_samples: int,
    name: str,
    settings: SampleSettings,
) -> SampleDataset | None:
    """Build a part; each phase continues in a source at the token where the phase before ended."""
    if num_samples == 0:
        return None
    first_tokens = [0] * len(sources)
    datasets, firsts = list[SampleDataset](), list[int]()
    phases = (settings.phases if name == "train" else ()) or ((0, settings.seq_length),)
    ends = [first for first, _ in phases[1:]]
    for (first, length), end in zip(phases, [*ends, None], strict=True):
        if first >= num_samples:
            break
        count = (end or num_samples) - first
        counts = _samples_per_source(weights, count)
        of_phase = replace(settings, seq_length=length, is_closed=end is not None)
        parts = [
            _build_source(source, documents, each, name, replace(of_phase, first_token=first_token)) if each else None
            for source, documents, each, first_token in zip(sources, ranges, counts, first_tokens, strict=True)
        ]
        datasets.append(_blended(parts, weights, count))
        firsts.append(first)
        first_tokens = [before + each * length for before, each in zip(first_tokens, counts, strict=True)]
    return datasets[0] if len(phases) == 1 else PhasedDataset(datasets, firsts)


def _blended(parts: Sequence[SampleDataset | None], weights: Sequence[float], num_samples: int) -> SampleDataset:
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    return BlendedDataset(parts, *build_blending_indices(np.asarray(weights, dtype=np.float64), num_samples))


def _samples_per_source(weights: Sequence[float], num_samples: int) -> list[int]:
    if len(weights) == 1:
        return [num_samples]
    dataset_index, _ = build_blending_indices(np.asarray(weights, dtype=np.float64), num_samples)
    return np.bincount(dataset_index, minlength=len(weights)).tolist()


def _build_source(
    indexed: IndexedDataset, documents: range, num_samples: int, name: str, settings: SampleSettings
) -> GPTDataset:
    def build(cache_dir: Path | None) -> GPTDataset:
        return GPTDataset(indexed, documents, num_samples, name, replace(settings, cache_dir=cache_dir))

    try:
        return build(settings.cache_dir or Path(f"{indexed.prefix}_cache"))
    except OSError as error:
        # A folder that was given must be writable; data on a read-only disk is not an error.
        if settings.cache_dir:
            raise DataError(
                f"--data-cache-path ({settings.cache_dir}) cannot be used: {error.strerror}; give a folder that can be "
                "written."
            ) from error
        return build(None)


def _check_usable(indexed: IndexedDataset, documents: range, seq_length: int, name: str) -> int:
    """Count the tokens in `documents`. Raises DataError if they are too few, or not token ids."""
    num_tokens = int(indexed.document_sizes[documents.start : documents.stop].sum())
    if indexed.dtype.kind not in "iu":
        raise DataError(
            f"{indexed.prefix} holds {indexed.dtype.name} values, not token ids, which are integers; give a dataset "
            "made by tools/preprocess_data.py."
        )
    if num_tokens < seq_length + 1:
        raise DataError(
            f"the {name} part of {indexed.prefix} has {num_tokens} tokens in {len(documents)} documents; one sample "
            f"takes {seq_length + 1} (--seq-length {seq_length} and one more); give more data, change --split, or "
            "shorten --seq-length."
        )
    return num_tokens
