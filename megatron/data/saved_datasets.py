"""Reader of folders that `save_to_disk` of Hugging Face `datasets` writes, by pyarrow alone, one batch in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.json_text import parse_object
from megatron.data.errors import DataError
from megatron.data.json_records import TooLong
from megatron.data.packed_files import require, unreadable
from megatron.data.parquet_files import check_any_column, objects_of

STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class SavedDataset:
    """A folder of one split, and its files in order."""

    folder: Path
    files: list[Path]


def is_saved(path: Path) -> bool:
    """Return whether a path is a folder that `save_to_disk` wrote."""
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def find_dataset(path: Path) -> SavedDataset:
    """Find the files of a folder. DataError if it holds several splits, or its files are missing."""
    if (path / SPLITS).is_file():
        splits = _read(path / SPLITS).get("splits")
        names = splits if isinstance(splits, list) else []
        if len(names) != 1:
            raise DataError(
                f"{path} holds the splits {', '.join(map(str, names)) or 'none'}; give the folder of one, such as "
                f"{path / str(names[0] if names else 'train')}."
            )
        return find_dataset(path / str(names[0]))
    state = _read(path / STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(f"{path / STATE} selects rows by an index, which is not supported; save the selection again.")
    listed = state.get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    files = [path / str(name) for name in names]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise DataError(f"{path} has no {missing or 'data files'}, which its {STATE} names; give a whole folder.")
    return SavedDataset(path, files)


def read_dataset(dataset: SavedDataset, columns: Sequence[str], max_bytes: int) -> Iterator[dict[str, Any] | TooLong]:
    """Yield the values of each row in those of `columns` that the dataset has. DataError if it is damaged."""
    arrow: Any = require("pyarrow", f"{dataset.folder}, a folder of datasets,")
    ipc: Any = require("pyarrow.ipc", f"{dataset.folder}, a folder of datasets,")
    for file in dataset.files:
        try:
            with arrow.memory_map(str(file)) as mapped, ipc.open_stream(mapped) as batches:
                found = check_any_column(file, batches.schema.names, columns)
                for batch in batches:
                    yield from objects_of(batch.select(found), max_bytes)
        except (arrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            raise unreadable(file, " ".join(str(error).split())) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON: {error}; give a whole folder.") from error
