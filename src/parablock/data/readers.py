"""Readers of data files: JSON lines, a JSON array, CSV, TSV, Parquet and Arrow, as they are or compressed.

A reader yields the fields of each row with its line, so that every later error can name it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from parablock.data.file_kinds import (
    COMPRESSIONS,
    cannot_be_read,
    check_is_file,
    check_is_text,
    decode_text,
    refuse_kind,
    rows_out_of,
    suffix_of,
)
from parablock.errors import DataError, InputError, reading
from parablock.printable import counted

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
NumberedFields = Iterator[tuple[int, dict[str, Any]]]
"""For each row its line, or its position in a table, from 1; and its fields."""

_LINES_REMEDY = (
    "A .jsonl or .json file holds one JSON object per line, in UTF-8; "
    "a .json file may also be one array of objects."
)
_BETWEEN_ITEMS = re.compile(r"[\s,]*")
_TOLD_DELIMITER = re.compile(r'"?sep=(.)"?[\r\n]+', re.IGNORECASE)
"""The first line that Excel writes and reads, for what parts the cells."""
_NAMELESS = "Unnamed: 0"
"""What pandas calls the column of row labels that it and R write first, without a name."""
_HEADING, _QUOTED = re.compile(r'\s*(?:"[^"]*"|[^"\r\n])*'), re.compile(r'"[^"]*"')


def read_file(source: str, path: Path) -> NumberedFields:
    """Yield the rows of one file of a suffix in `SUFFIXES`.

    Args:
        source: The file as the user wrote it, for messages.
        path: The same file.

    Raises:
        DataError: The file cannot be read, is damaged, or is not what its suffix says; names the line.
    """
    suffix = suffix_of(path)
    if suffix in (".parquet", ".arrow", ".feather"):
        return _read_table(source, path, suffix)
    raw = _read_bytes(source, path)
    check_is_text(source, path, raw)
    if suffix in (".csv", ".tsv"):
        return _read_csv(source, raw, suffix)
    if suffix == ".json":
        start = raw.removeprefix(codecs.BOM_UTF8).lstrip()
        if start[:1] == b"[":
            return _read_array(source, raw)
        _check_not_spread(source, start)
    return _read_lines(source, raw)


def read_text_file(source: str) -> str:
    """Return a text file without its byte order mark.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    path = Path(source).expanduser()
    with reading(source, DataError):
        check_is_file(source, path)
    raw = _read_bytes(source, path)
    check_is_text(source, path, raw)
    text, error = decode_text(source, raw)
    if error:
        raise error
    return text


def _read_bytes(source: str, path: Path) -> bytes:
    try:
        if path.suffix.lower() not in COMPRESSIONS:
            return path.read_bytes()
        return _decompressed(path)
    except (OSError, ValueError, EOFError) as error:
        raise cannot_be_read(source, error) from error


def _decompressed(path: Path) -> bytes:
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets, and is slow to import

    path.open("rb").close()  # the system's own words, where it refuses
    with pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix.lower()]) as stream:
        content: bytes = stream.read()
    return content


def _read_lines(source: str, raw: bytes) -> NumberedFields:
    for line, text in enumerate(raw.split(b"\n"), start=1):
        if text.strip() and text != codecs.BOM_UTF8:
            yield line, _fields(source, line, _parse(source, line, text))


def _read_array(source: str, raw: bytes) -> NumberedFields:
    wrong, end, raw = None, 0, raw.removeprefix(codecs.BOM_UTF8)
    try:
        json.loads(raw)  # where that is valid, the rest only finds the lines
    except (ValueError, RecursionError) as error:  # named after the rows before it
        wrong, end = _not_json(source, 1, error), getattr(error, "pos", 0)
        if isinstance(error, UnicodeDecodeError):
            raw, end = raw[: error.start], len(raw)
    text, decoder = raw.decode(errors="surrogatepass"), json.JSONDecoder(object_pairs_hook=_once)
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    while True:
        start = _BETWEEN_ITEMS.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too
        line += text.count("\n", at, start)
        if wrong and start >= min(end, len(text)):
            raise wrong
        if text[start] == "]":
            if wrong:
                raise wrong
            return
        try:
            value, at = decoder.raw_decode(text, start)
        except RepeatedKeyError as error:
            raise _not_json(source, line, error) from None
        except (ValueError, RecursionError):
            if wrong is None:
                raise
            raise wrong from None
        if wrong and at > end:
            raise wrong
        yield line, _fields(source, line, value)
        line += text.count("\n", start, at)


def _check_not_spread(source: str, start: bytes) -> None:
    """Refuse a file that is one JSON object over several lines, such as {"data": [...]}."""
    with suppress(ValueError, RecursionError):
        json.loads(start.partition(b"\n")[0])
        return
    whole = None
    with suppress(ValueError, RecursionError):  # the reader of lines says what is wrong
        whole = json.loads(start)
    if isinstance(whole, dict):
        name = next((name for name, value in whole.items() if isinstance(value, list)), "rows")
        raise DataError(
            f"{source} is one JSON object over several lines, with the fields {', '.join(whole)}.",
            remedy=f"{_LINES_REMEDY} {rows_out_of(source, name)}",
        )


class RepeatedKeyError(ValueError):
    """An object of JSON has a key twice, of which readers keep the one or the other."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON text; a ValueError or RecursionError where it is none, or repeats a key."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"an object has the key {name!r} twice")
    return found


def _parse(source: str, line: int, text: bytes) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(source, line, error) from None


def _not_json(source: str, line: int, error: Exception) -> DataError:
    if isinstance(error, RepeatedKeyError):
        return DataError(
            f"{source}, line {line}: {error}.",
            cause="Only one of the two values could be used, and which one is not said.",
            remedy="Take one out, or rename it.",
        )
    if isinstance(error, json.JSONDecodeError):
        line, reason = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    elif isinstance(error, UnicodeDecodeError):
        reason = f"byte 0x{error.object[error.start]:02x} at position {error.start} is not UTF-8"
    elif isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    else:
        reason = f"it has a number of more than {sys.get_int_max_str_digits()} digits"
    return DataError(f"{source}, line {line} is not JSON: {reason}.", remedy=_LINES_REMEDY)


def _fields(source: str, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        said = f"{source}, line {line} holds a value of type {type(value).__name__}, not an object."
        raise DataError(said, remedy=_LINES_REMEDY)
    return value


def _read_csv(source: str, raw: bytes, suffix: str) -> NumberedFields:
    """Yield the rows below the heading; every value is text."""
    text, undecodable = decode_text(source, raw)
    told = _TOLD_DELIMITER.match(text)
    csv.field_size_limit(sys.maxsize)
    delimiter = told[1] if told else "\t" if suffix == ".tsv" else _delimiter_of(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    if told:
        next(reader)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if undecodable:
                raise undecodable from None
            raise DataError(
                f"{source}, line {line} is not {suffix[1:].upper()}: {error}.",
                cause='A quote is not closed, or stands inside a cell without being doubled ("").',
                remedy="Export it again with every cell in quotes, or as JSON lines.",
            ) from error
        if cells is None:
            if undecodable:
                raise undecodable
            return
        if not cells:
            continue
        if names is None:
            names = _check_heading(source, line, cells)
        elif len(cells) != len(names):
            raise DataError(
                f"{source}, line {line} has {counted(len(cells), 'cell')}, and the heading names "
                f"{counted(len(names), 'column')} ({', '.join(names)}).",
                cause=f"A cell holds {delimiter!r} without quotes, or the row is cut.",
                remedy="Put the cell in quotes, or export the table again.",
            )
        else:
            yield line, dict(zip(names, cells, strict=True))


def _check_heading(source: str, line: int, cells: list[str]) -> list[str]:
    """Return the names of the columns; the first may have none, as the row labels of pandas and R."""
    names = [cell.strip() for cell in cells]
    if len(names) > 1 and not names[0] and _NAMELESS not in names:
        names[0] = _NAMELESS
    where = f"{source}, line {line}: the heading "
    if "" in names:
        raise DataError(
            f"{where}has no name for column {names.index('') + 1} of {len(names)}: {', '.join(names)}.",
            remedy="The first line of a table names its columns. Name that one, or take it out; row labels are not "
            "written with index=False in pandas, and with row.names=FALSE in R.",
        )
    check_once(where, names)
    return names


def check_once(where: str, names: Sequence[str]) -> None:
    """Refuse names of columns of which one stands twice, with a `DataError` that begins with `where`."""
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(
            f"{where}has the column {twice[0]!r} {names.count(twice[0])} times: {', '.join(names)}.",
            cause="Only one of them could be used, and which one is not said.",
            remedy="Rename one, or take it out.",
        )


def _delimiter_of(text: str) -> str:
    """Return what parts the cells: what the heading has and most rows fit; a comma if all rows are one cell."""
    heading = _HEADING.match(text)[0]  # type: ignore[index]  # matches the empty string too
    found = [each for each in ",;\t" if each in _QUOTED.sub("", heading)]
    if found in ([], [","]):
        return ","

    def lengths(delimiter: str) -> list[int]:
        counted: list[int] = []
        with suppress(csv.Error):
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            counted += (len(cells) for cells in islice(filter(None, rows), 20))
        return counted or [0]

    best = max(found, key=lambda each: ((cells := lengths(each))[1:].count(cells[0]), cells[0]))
    named, *others = lengths(best)
    is_one_column = set(others) == {1} and max(lengths(",")) == 1 < named
    return "," if is_one_column else best


def _read_table(source: str, path: Path, suffix: str) -> NumberedFields:
    import pyarrow

    is_plain, begins = path.suffix.lower() not in COMPRESSIONS, b""
    try:
        with path.open("rb") as file:  # the system's own words, where it refuses
            begins = file.read(16)
        given = str(path) if is_plain else pyarrow.BufferReader(_decompressed(path))
        table = _read_parquet(source, given) if suffix == ".parquet" else _read_arrow(given)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if is_plain:
            refuse_kind(source, path, begins)
        raise cannot_be_read(source, error) from error
    check_once(f"{source} ", table.column_names)
    try:
        rows = table.to_pylist()
    except Exception as error:  # of any class: days beyond 9999, unknown time zones, text that is no UTF-8
        raise _not_held(source, table, error) from error
    return iter(enumerate(map(remover_of_fill(table.schema), rows), start=1))


def _not_held(source: str, table: Any, error: Exception) -> InputError:
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.to_pylist()
        except Exception as cause:
            said = f"{source} has a value that cannot be read in column {name!r}, of type {column.type}: {cause}"
            return DataError(said, remedy="Take the column out, or write it as text, and export it again.")
    return cannot_be_read(source, error)


def remover_of_fill(schema: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what takes out of a row the null fields that the schema of its table gives to every object."""
    nested = [column.name for column in schema if _has_struct(column.type)]
    return lambda row: row | {name: _without_fill(row[name]) for name in nested}


def _without_fill(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_fill(item) for name, item in value.items() if item is not None}
    return [_without_fill(item) for item in value] if isinstance(value, list) else value


def _has_struct(kind: Any) -> bool:
    import pyarrow

    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return pyarrow.types.is_struct(kind) or any(map(_has_struct, inner))


def _read_parquet(source: str, given: Any) -> Any:
    import pyarrow.parquet  # type: ignore[import-untyped]

    check_once(f"{source} ", pyarrow.parquet.read_schema(given).names)
    return pyarrow.parquet.read_table(given)


def _read_arrow(given: Any) -> Any:
    """Read an Arrow file, or the stream that `datasets` saves under the same suffix."""
    import pyarrow

    try:
        return pyarrow.ipc.open_file(given).read_all()
    except pyarrow.ArrowInvalid:
        stream = pyarrow.OSFile(given) if isinstance(given, str) else given
        if not isinstance(given, str):
            stream.seek(0)
        return pyarrow.ipc.open_stream(stream).read_all()
