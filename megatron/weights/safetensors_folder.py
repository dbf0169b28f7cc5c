"""Safetensors folders in Hugging Face's layout, read and written one tensor at a time.

    model.safetensors                          all tensors, or
    model-00001-of-00003.safetensors ...       shards, and
    model.safetensors.index.json               {"weight_map": {tensor name: shard}}

A file is the length of its header (8 bytes, little endian), a JSON header that spaces may follow, and the tensors'
bytes without gaps. The safetensors package maps whole files and takes whole shards. This module does neither, so a
model of any size can be converted with one tensor in memory.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Size, Tensor

from megatron.core.atomic_file import flush_to_disk, temporary_path
from megatron.core.json_text import parse_object
from megatron.weights.errors import WeightsError, raise_if_no_room
from megatron.weights.manifest import flush_files, seal_safetensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_MAX_SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PLAIN_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,255}")
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 * 10**6  # the limit that the format sets
_COMPARED_BYTES = 2**24
_RESERVED_HEADER_BYTES = 256 * 1024 - _LENGTH_BYTES


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor is stored: bytes [start, end) of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFolder:
    """The tensors of a folder, or of one .safetensors file. Headers are read at once, tensors on demand."""

    def __init__(self, path: str | Path) -> None:
        """Read the headers; WeightsError if the folder or a shard is missing or cut off, or the index is wrong."""
        self.path = Path(path)
        self._tensors = _find_tensors(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, without reading it."""
        return self._find(name).dtype

    def get(self, name: str) -> Tensor:
        """Read one tensor into CPU memory of its own, in its stored dtype."""
        shape = self.shape(name)
        return self.read(name, 0, Size(shape).numel()).view(shape)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Read elements [start, start + count) of the flattened tensor, and no others; [count], in its stored dtype."""
        stored = self._find(name)
        values = torch.empty(count, dtype=stored.dtype)
        offset = stored.start + start * values.element_size()
        with stored.file.open("rb") as file:
            file.seek(offset)
            num_read = file.readinto(_bytes_of(values))
        if num_read != values.nbytes:
            raise WeightsError(_cut_off(stored.file, offset + num_read, stored.end))
        return values

    def same(self, first: str, second: str) -> bool:
        """Return whether two tensors are bit-equal, reading a few megabytes of each at a time."""
        a, b = self._find(first), self._find(second)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.file.open("rb") as file_of_a, b.file.open("rb") as file_of_b:
            file_of_a.seek(a.start)
            file_of_b.seek(b.start)
            sizes = [min(_COMPARED_BYTES, a.end - start) for start in range(a.start, a.end, _COMPARED_BYTES)]
            return all(file_of_a.read(size) == file_of_b.read(size) for size in sizes)

    def _find(self, name: str) -> _StoredTensor:
        if name not in self._tensors:
            raise WeightsError(
                f"{self.path} has no tensor {name!r} (it has {len(self._tensors)}); use weights that are whole."
            )
        return self._tensors[name]


class SafetensorsWriter:
    """Writes tensors as they come, into shards of at most `max_shard_bytes` unless one tensor alone is larger.

    The folder appears, complete, when `close` is called or the `with` block ends without an error. Until then all files
    are in `staging`. Other files that belong in the folder may be put there.
    """

    def __init__(
        self, folder: str | Path, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES, with_manifest: bool = False
    ) -> None:
        """Begin a folder; `with_manifest` adds the sizes and hashes of the files of tensors.

        WeightsError if the folder exists and is not empty.
        """
        self.folder = Path(folder)
        self._finish_files = seal_safetensors if with_manifest else flush_files
        if max_shard_bytes < 1:
            raise WeightsError(f"the size of a shard ({max_shard_bytes}) must be 1 byte or more; use for example 5e9.")
        check_new(self.folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.staging = temporary_path(self.folder)
        self.staging.mkdir()
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._shard: _ShardWriter | None = None
        self._total_bytes = 0

    @property
    def num_shards(self) -> int:
        """Shards begun so far."""
        return len(self._shards)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor from any device and with any strides; the caller may free or reuse it on return."""
        if name in self._names:
            raise WeightsError(f"the tensor {name!r} is written twice to {self.folder}.")
        if tensor.dtype not in _DTYPE_NAMES:
            raise WeightsError(f"the tensor {name!r} is {tensor.dtype}, which safetensors cannot hold.")
        tensor = tensor.detach().to("cpu").contiguous()
        shard = self._shard
        if shard is None or not shard.has_room(name, tensor, self._max_shard_bytes):
            shard = self._begin_shard()
        shard.add(name, tensor)
        self._names.add(name)
        self._shards[-1].append(name)
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Name the shards, write the index and publish the folder."""
        if self._shard is None:
            self._begin_shard()
        self._finish_shard()
        names = _shard_names(len(self._shards))
        for number, name in enumerate(names):
            _temporary_shard(self.staging, number).rename(self.staging / name)
        if len(names) > 1:
            weight_map = {tensor: names[number] for number, shard in enumerate(self._shards) for tensor in shard}
            self._write_index(weight_map)
        self._finish_files(self.staging)
        self.staging.rename(self.folder)
        flush_to_disk(self.folder.parent)

    def discard(self) -> None:
        """Remove what was written."""
        if self._shard is not None:
            with suppress(OSError):  # flushing the buffer may fail on a full disk too
                self._shard.file.close()
        shutil.rmtree(self.staging, ignore_errors=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        try:
            if error_type is None:
                self.close()
            elif isinstance(error, OSError):
                raise error
        except OSError as fault:
            raise_if_no_room(fault, self.folder)
            raise
        finally:
            self.discard()

    def _begin_shard(self) -> _ShardWriter:
        self._finish_shard()
        self._shard = _ShardWriter(_temporary_shard(self.staging, len(self._shards)))
        self._shards.append([])
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shard.finish()
            self._shard = None

    def _write_index(self, weight_map: Mapping[str, str]) -> None:
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def check_new(folder: Path, flag: str = "") -> None:
    """Raise WeightsError, naming the flag that gave the folder, if it exists and is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        shown = f"{flag} ({folder})" if flag else folder
        raise WeightsError(f"{shown} exists and is not an empty folder; name a new one, or remove it.")


class _ShardWriter:
    """One file: space reserved for the header, then the tensors; the header is written last."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb")
        self.file.seek(_LENGTH_BYTES + _RESERVED_HEADER_BYTES)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = len(json.dumps(self._header))
        self._num_bytes = 0

    def has_room(self, name: str, tensor: Tensor, max_bytes: int) -> bool:
        """Return whether a tensor fits: its bytes, its line of the header, and its alignment."""
        if self._num_bytes == 0:
            return True
        is_aligned = self._num_bytes % tensor.element_size() == 0
        fits_header = self._header_bytes + len(self._line(name, tensor)) <= _RESERVED_HEADER_BYTES
        return is_aligned and fits_header and self._num_bytes + tensor.nbytes <= max_bytes

    def add(self, name: str, tensor: Tensor) -> None:
        self._header[name] = self._entry(tensor)
        self._header_bytes += len(self._line(name, tensor))
        self.file.write(_bytes_of(tensor))
        self._num_bytes += tensor.nbytes

    def finish(self) -> None:
        header = json.dumps(self._header).encode().ljust(_RESERVED_HEADER_BYTES)
        self.file.seek(0)
        self.file.write(_RESERVED_HEADER_BYTES.to_bytes(_LENGTH_BYTES, "little") + header)
        self.file.close()

    def _entry(self, tensor: Tensor) -> dict[str, Any]:
        offsets = [self._num_bytes, self._num_bytes + tensor.nbytes]
        return {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def _line(self, name: str, tensor: Tensor) -> str:
        return ", " + json.dumps({name: self._entry(tensor)})


def _find_tensors(path: Path) -> dict[str, _StoredTensor]:
    if path.is_file():
        return _read_header(path)
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file() and index.is_file():
        raise WeightsError(f"{path} holds both {SINGLE_FILE} and {INDEX_FILE}, two sets of weights; remove one.")
    if index.is_file():
        return _read_shards(index)
    if single.is_file():
        return _read_header(single)
    what = f"holds neither {SINGLE_FILE} nor {INDEX_FILE}" if path.is_dir() else "is not there"
    raise WeightsError(f"{path} {what}; name a folder of safetensors, which transformers' save_pretrained writes.")


def _read_shards(index: Path) -> dict[str, _StoredTensor]:
    """Read the headers of all the shards that the index names; their tensors are all part of the weights."""
    weight_map = _weight_map(index)
    tensors: dict[str, _StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if not file.is_file():
            raise WeightsError(f"{index} names the shard {shard}, which is not there; copy it into {index.parent}.")
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise WeightsError(f"{file} and {tensors[name].file} both hold {name!r}; remove the shard of others.")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != index.parent / shard:
            raise WeightsError(f"{index} names the tensor {name!r} in {shard}, which lacks it; copy both again.")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Read {tensor: shard}; WeightsError unless each shard is the plain name of a file next to the index."""
    try:
        weight_map = parse_object(index.read_bytes())["weight_map"].items()
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{index} is not an index of shards ({error!r}); copy it again.") from error
    for _, shard in weight_map:
        if not isinstance(shard, str) or not _PLAIN_NAME.fullmatch(shard):
            raise WeightsError(
                f"{index} names the shard {shard!r}, which must be the plain name of a file in {index.parent}; copy "
                "the index again."
            )
    return dict(weight_map)


def _read_header(path: Path) -> dict[str, _StoredTensor]:
    """Return where each tensor of a file is stored; WeightsError if the file is cut off or not in this format."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise WeightsError(f"{path} is not a safetensors file (a header of {length} bytes); copy it again.")
        text = file.read(length)
    data = _LENGTH_BYTES + length
    if num_bytes < data:
        raise WeightsError(_cut_off(path, num_bytes, data))
    try:
        header = parse_object(text)
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(path, data, entry) for name, entry in header.items()}
        needed = _end_without_gaps(tensors, data)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsError(f"{path} is not a safetensors file that can be read ({error!r}); copy it again.") from error
    if num_bytes < needed:
        raise WeightsError(_cut_off(path, num_bytes, needed))
    if num_bytes > needed:
        raise WeightsError(f"{path} has {num_bytes} bytes and its header describes {needed}; copy it again.")
    return tensors


def _stored_tensor(path: Path, data: int, entry: Mapping[str, Any]) -> _StoredTensor:
    start, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if not all(type(value) is int and value >= 0 for value in (start, end, *shape)):
        raise ValueError(f"shape {list(shape)} at bytes {start} to {end}")
    num_bytes = dtype.itemsize * math.prod(shape)
    if end - start != num_bytes:
        raise ValueError(f"bytes {start} to {end} for a tensor of {num_bytes}")
    return _StoredTensor(path, dtype, shape, data + start, data + end)


def _end_without_gaps(tensors: Mapping[str, _StoredTensor], data: int) -> int:
    """Return where the last tensor ends; ValueError unless the tensors follow one another from `data` without gaps."""
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise ValueError(f"{name} begins at byte {tensor.start - data}, and the one before it ends at {end - data}")
        end = tensor.end
    return end


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _cut_off(path: Path, num_bytes: int, needed: int) -> str:
    return f"{path} is cut off: it has {num_bytes} bytes and its header asks for {needed}; copy it again."


def _temporary_shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number + 1}.tmp"


def _shard_names(count: int) -> list[str]:
    """Return Hugging Face's names for `count` shards."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
