"""Order of a dataset's samples, a function of (document sizes, documents, sequence length, seed).

Every epoch reads the documents in a new random order. The concatenated epochs are cut into samples, and the samples
that end within one epoch are shuffled among themselves:

    document_index  [num_epochs * num_documents]   documents in reading order
    sample_index    [num_samples + 1, 2]           where each sample starts, in reading order
    shuffle_index   [num_samples]                  row of sample_index for the i-th sample drawn

More epochs only append to each array: earlier samples do not change. Every document is read once before any is read
twice.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.core.atomic_file import atomic_path
from megatron.data.checked_file import append_checksum, is_as_written
from megatron.data.index_helpers import build_sample_index

CACHE_VERSION = 2
DOCUMENT_STREAM, SAMPLE_STREAM = 0, 1
LOG = logging.getLogger("megatron")


@dataclass(frozen=True)
class SampleOrder:
    """The three arrays of the module's docstring, int64."""

    document_index: npt.NDArray[np.int64]
    sample_index: npt.NDArray[np.int64]
    shuffle_index: npt.NDArray[np.int64]


@dataclass(frozen=True)
class OrderPlan:
    """The inputs of an order: document sizes int64 [...] of the whole file, the documents used, and the rest.

    The samples begin at token `first_token` of the concatenated epochs. There are as many as the epochs hold, or at
    most `num_samples`, which are then shuffled without those that would follow.
    """

    document_sizes: npt.NDArray[np.int64]
    documents: range
    seq_length: int
    seed: int
    num_epochs: int
    first_token: int = 0
    num_samples: int | None = None

    @property
    def tokens_per_epoch(self) -> int:
        return int(self.document_sizes[self.documents.start : self.documents.stop].sum())

    def num_samples_after(self, num_epochs: int) -> int:
        """Return the number of complete samples after `num_epochs` epochs."""
        count = max(0, num_epochs * self.tokens_per_epoch - 1 - self.first_token) // self.seq_length
        return count if self.num_samples is None else min(count, self.num_samples)

    def fingerprint(self) -> str:
        """Return a name that two plans share only if they give the same order, in files of the same format."""
        digest = hashlib.sha256()
        settings = (CACHE_VERSION, self.documents.start, self.seq_length, self.seed, self.num_epochs)
        phase = (self.first_token, self.num_samples)
        digest.update(repr(settings if phase == (0, None) else settings + phase).encode())
        sizes = self.document_sizes[self.documents.start : self.documents.stop]
        digest.update(np.ascontiguousarray(sizes, dtype="<i8").data)
        return digest.hexdigest()[:32]


def num_epochs_for(num_samples: int, tokens_per_epoch: int, seq_length: int, first_token: int = 0) -> int:
    """Return the number of epochs that hold `num_samples` samples of seq_length + 1 tokens that overlap by one."""
    return -(-(first_token + num_samples * seq_length + 1) // tokens_per_epoch)


def build_order(plan: OrderPlan) -> SampleOrder:
    """Compute the order that `plan` describes."""
    documents = np.arange(plan.documents.start, plan.documents.stop, dtype=np.int64)
    document_index = np.concatenate(
        [epoch_random(plan.seed, epoch, DOCUMENT_STREAM).permutation(documents) for epoch in range(plan.num_epochs)]
    )
    num_samples = plan.num_samples_after(plan.num_epochs)
    sample_index = _sample_index(plan, document_index)[: num_samples + 1]
    shuffle_index = np.arange(num_samples, dtype=np.int64)
    for epoch in range(plan.num_epochs):
        first, last = plan.num_samples_after(epoch), plan.num_samples_after(epoch + 1)
        epoch_random(plan.seed, epoch, SAMPLE_STREAM).shuffle(shuffle_index[first:last])
    return SampleOrder(document_index, sample_index, shuffle_index)


def _sample_index(plan: OrderPlan, document_index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Cut the documents into samples from `first_token` on."""
    if not plan.first_token:
        return build_sample_index(
            plan.document_sizes, document_index, plan.seq_length, plan.num_epochs, plan.tokens_per_epoch
        )
    ends = np.cumsum(plan.document_sizes[document_index])
    first = int(np.searchsorted(ends, plan.first_token, side="right"))
    rest = int(ends[first]) - plan.first_token
    # The document that the first token is in counts as one of its own, of what is left of it.
    sizes, documents = np.append(plan.document_sizes, rest), document_index[first:].copy()
    read_before = int(plan.document_sizes[documents[0]]) - rest
    documents[0] = len(sizes) - 1
    index = build_sample_index(sizes, documents, plan.seq_length, 1, int(ends[-1]) - plan.first_token)
    index[index[:, 0] == 0, 1] += read_before
    index[:, 0] += first
    return index


def cached_order(
    plan: OrderPlan, cache_dir: Path, build: Callable[[OrderPlan], SampleOrder] = build_order
) -> SampleOrder:
    """Load the order from `cache_dir`; build and cache it if it is absent or, with a warning, damaged.

    Any number of processes may call this at once. Raises OSError if the folder cannot be written.
    """
    path = cache_dir / f"{plan.fingerprint()}-sample-order.npy"
    order = _load(plan, path)
    if order is not None:
        return order
    cache_dir.mkdir(parents=True, exist_ok=True)
    order = build(plan)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            np.save(file, np.concatenate((order.document_index, order.sample_index.ravel(), order.shuffle_index)))
        append_checksum(temporary, path.name)
    return _load(plan, path) or order


def _load(plan: OrderPlan, path: Path) -> SampleOrder | None:
    """Memory-map the flat array that holds all three; None if the file is absent or, with a warning, damaged."""
    if not path.exists():
        return None
    if not is_as_written(path, path.name):
        LOG.warning("%s is cut short or was changed since it was written; rebuilding it", path)
        return None
    flat = np.asarray(np.load(path, mmap_mode="r"))
    num_documents, num_samples = plan.num_epochs * len(plan.documents), plan.num_samples_after(plan.num_epochs)
    document_index, sample_index, shuffle_index = np.split(flat, [num_documents, num_documents + 2 * (num_samples + 1)])
    return SampleOrder(document_index, sample_index.reshape(-1, 2), shuffle_index)


def epoch_random(seed: int, epoch: int, stream: int) -> np.random.RandomState:
    """Return numpy's legacy generator: the only one whose stream numpy promises never to change."""
    return np.random.RandomState([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch, stream])
