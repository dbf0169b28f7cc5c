"""Reader of Parquet rows, one row group in memory at a time.

Pages are verified against their checksums if they have any: writers such as pyarrow leave them out by default.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.data.errors import DataError
from megatron.data.json_records import TooLong
from megatron.data.packed_files import require, unreadable

ROWS_PER_READ, OBJECTS_PER_READ = 1024, 64
LARGEST_HEADER_START = 32  # bytes that hold the first four fields of a page's header
NEXT_FIELD_INT32 = 0x15


def read_rows(path: Path, columns: Sequence[str], skip: int = 0) -> Iterator[tuple[bytes | None, ...]]:
    """Yield the bytes of each row's texts, after the first `skip` rows: one per column, None if the cell is empty.

    Raises DataError if the file is damaged or has no such columns of text.
    """
    arrow: Any = require("pyarrow", f"{path}, a Parquet file,")
    parquet: Any = require("pyarrow.parquet", f"{path}, a Parquet file,")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(path, file.schema_arrow, columns, arrow)
            _check_counts(path, file.metadata)
            yield from _rows(path, file, columns, skip, arrow)
    # UnicodeDecodeError: from the name of a column, even one that is not read.
    except (arrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise unreadable(path, " ".join(str(error).split())) from error


def read_objects(path: Path, columns: Sequence[str], max_bytes: int) -> Iterator[dict[str, Any] | TooLong]:
    """Yield the values, of any type, of each row in those of `columns` that the file has. DataError if it is damaged.

    A row of more than `max_bytes` bytes is not converted.
    """
    arrow: Any = require("pyarrow", f"{path}, a Parquet file,")
    parquet: Any = require("pyarrow.parquet", f"{path}, a Parquet file,")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            found = check_any_column(path, file.schema_arrow.names, columns)
            _check_counts(path, file.metadata)
            for batch in file.iter_batches(OBJECTS_PER_READ, columns=found):
                yield from objects_of(batch, max_bytes)
    except (arrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise unreadable(path, " ".join(str(error).split())) from error


def check_any_column(path: Path, names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return those of `columns` that a file has. DataError if there is none."""
    found = [name for name in columns if name in names]
    if not found:
        raise DataError(f"{path}: columns {', '.join(names) or 'none'}; one of {', '.join(columns)} is needed.")
    return found


def objects_of(batch: Any, max_bytes: int) -> Iterator[dict[str, Any] | TooLong]:
    """Yield the values of each row of a batch of Arrow, without nulls.

    Arrow gives every object of a column the keys of all of them, null where an object has no such key.
    """
    for place in range(batch.num_rows):
        row = batch.slice(place, 1)
        yield TooLong(max_bytes) if row.nbytes > max_bytes else _without_nulls(row.to_pylist()[0])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def has_checksums(path: Path, columns: Sequence[str]) -> bool:
    """Return whether the columns' pages have checksums, judged by each first page, in a file `read_rows` can read."""
    parquet: Any = require("pyarrow.parquet", f"{path}, a Parquet file,")
    with path.open("rb") as raw, parquet.ParquetFile(path) as file:
        if not file.num_row_groups:
            return True
        group = file.metadata.row_group(0)
        chunks = [group.column(index) for index in range(group.num_columns)]
        for chunk in (chunk for chunk in chunks if chunk.path_in_schema in columns):
            raw.seek(chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset)
            if not _header_has_checksum(raw.read(LARGEST_HEADER_START)):
                return False
    return True


def _header_has_checksum(header: bytes) -> bool:
    """Return whether a page header, in Thrift's compact form, has a fourth field after its type and two sizes.

    A field is one byte, with the increment of the field number and the field's type, and a number of seven bits a byte.
    """
    place = 0
    for _ in range(3):
        place += 1
        while header[place] & 0x80:
            place += 1
        place += 1
    return header[place] == NEXT_FIELD_INT32


def _check_counts(path: Path, metadata: Any) -> None:
    """Raise DataError unless the row groups of a file have as many rows as the file.

    The footer has no checksum, and a reader stops at the number of rows that the footer gives.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    num_rows = sum(group.num_rows for group in groups)
    if num_rows != metadata.num_rows:
        raise unreadable(path, f"it says {metadata.num_rows} rows, and its row groups {num_rows}")


def _rows(path: Path, file: Any, columns: Sequence[str], skip: int, arrow: Any) -> Iterator[tuple[bytes | None, ...]]:
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        if skip >= num_rows:
            skip -= num_rows
            continue
        num_read = 0
        for table in file.iter_batches(ROWS_PER_READ, row_groups=[group], columns=list(columns)):
            cells = [_bytes_of(table.column(name), arrow) for name in columns]
            rows = list(zip(*cells, strict=True))
            yield from rows[max(skip - num_read, 0) :]
            num_read += len(rows)
        if num_read != num_rows:
            raise unreadable(path, f"row group {group} has {num_read} rows and says {num_rows}")
        skip = 0


def _bytes_of(column: Any, arrow: Any) -> list[bytes | None]:
    """Return the cells as stored; the caller decodes them and checks that they are UTF-8."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    cells: list[bytes | None] = column.cast(arrow.large_binary()).to_pylist()
    return cells


def _check_columns(path: Path, schema: Any, columns: Sequence[str], arrow: Any) -> None:
    for name in columns:
        if schema.names.count(name) != 1:
            found = ", ".join(schema.names) or "none"
            raise DataError(f"{path}: no column {name!r}; columns found: {found}; name one by --json-keys.")
        kind = schema.field(name).type
        value = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if not (arrow.types.is_string(value) or arrow.types.is_large_string(value) or _is_view(value, arrow)):
            raise DataError(f"{path}: column {name!r} is of type {kind}, not text; name another by --json-keys.")


def _is_view(kind: Any, arrow: Any) -> bool:
    return hasattr(arrow.types, "is_string_view") and bool(arrow.types.is_string_view(kind))
