"""Readers of data files: JSON lines, a JSON array, CSV, TSV, Parquet and Arrow, as they are or compressed.

A reader yields the fields of each row with its line, so that every later error can name it. Text is UTF-8, with or
without a byte order mark; a file in another encoding is named as what it is.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from parablock.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Suffix behind another one → the codec of it."""

_UNPACK = {".gz": "zcat", ".bz2": "bzcat", ".zst": "zstdcat"}

NumberedFields = Iterator[tuple[int, dict[str, Any]]]
"""For each row its line, or its position in a table, from 1; and its fields."""

_LINES_REMEDY = (
    "A .jsonl or .json file holds one JSON object per line, in UTF-8; "
    "a .json file may also be one array of objects."
)
_BETWEEN_ITEMS = re.compile(r"[\s,]*")
_TOLD_DELIMITER = re.compile(r'"?sep=(.)"?[\r\n]+', re.IGNORECASE)
"""The first line that Excel writes and reads, for what parts the cells."""
_HEADING, _QUOTED = re.compile(r'\s*(?:"[^"]*"|[^"\r\n])*'), re.compile(r'"[^"]*"')
_MARKS = dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32")
_MARKS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16")
"""Byte order marks of other encodings, longer ones first."""


def suffix_of(path: Path) -> str:
    """Return the suffix that says what a file holds, without that of a compression; in small letters."""
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return Path(name).suffix


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
    _check_encoding(source, path, raw)
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
    raw = _read_bytes(source, path)
    _check_encoding(source, path, raw)
    text, error = _decode(source, raw)
    if error:
        raise error
    return text


def _read_bytes(source: str, path: Path) -> bytes:
    try:
        if path.suffix.lower() not in COMPRESSIONS:
            return path.read_bytes()
        return _decompressed(path)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(source, error) from error


def _decompressed(path: Path) -> bytes:
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets, and is slow to import

    path.open("rb").close()  # the system's own words, where it refuses
    with pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix.lower()]) as stream:
        content: bytes = stream.read()
    return content


def _check_encoding(source: str, path: Path, raw: bytes) -> None:
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "")
    if not encoding and b"\0" in raw[:4]:
        encoding = "UTF-16"
    if encoding:
        raise DataError(
            f"{source} is in {encoding}, and not in UTF-8.",
            cause=f"Its first bytes are {raw[:4].hex(' ')}; spreadsheets and PowerShell write such files.",
            remedy=f"Convert it: {_piped(source, f'iconv -f {encoding} -t UTF-8')} > {_new_name(path)}",
        )


def rows_out_of(source: str, name: str) -> str:
    """Return the advice that takes the list of one field of an object out of a file."""
    path = shlex.quote(f".[{json.dumps(name, ensure_ascii=False)}][]" if not name.isidentifier() else f".{name}[]")
    return f"For the list in {name!r}: {_piped(source, f'jq -c {path}')} > rows.jsonl"


def _piped(source: str, command: str) -> str:
    """Return the command line that gives a file's text to a command, whatever compresses the file."""
    unpack = _UNPACK.get(Path(source).suffix.lower())
    name = shlex.quote(source)
    return f"{unpack} {name} | {command}" if unpack else f"{command} {name}"


def _new_name(path: Path) -> str:
    plain = path.name.removesuffix(path.suffix) if path.suffix.lower() in COMPRESSIONS else path.name
    return shlex.quote(f"utf8_{plain}")


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
    text, undecodable = _decode(source, raw)
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
                f"{source}, line {line} has {len(cells)} cells, and the heading names {len(names)} columns "
                f"({', '.join(names)}).",
                cause=f"A cell holds {delimiter!r} without quotes, or the row is cut.",
                remedy="Put the cell in quotes, or export the table again.",
            )
        else:
            yield line, dict(zip(names, cells, strict=True))


def _check_heading(source: str, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{source}, line {line}: the heading has an empty name or one that stands twice: {', '.join(names)}.",
            remedy="The first line of a table names its columns, each by its own name.",
        )
    return names


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


def _decode(source: str, raw: bytes) -> tuple[str, DataError | None]:
    """Return a text and no error, or what comes before the first line that is not UTF-8, and the error for it."""
    try:
        return raw.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        found = error
    line = raw.count(b"\n", 0, found.start) + 1
    before = raw[: raw.rfind(b"\n", 0, found.start) + 1].decode("utf-8-sig")
    return before, DataError(
        f"{source}, line {line}: byte 0x{raw[found.start]:02x} is not UTF-8.",
        cause="The file is in another encoding, such as Windows-1252.",
        remedy=f"Convert it: {_piped(source, 'iconv -f WINDOWS-1252 -t UTF-8')} > {_new_name(Path(source))}",
    )


def _read_table(source: str, path: Path, suffix: str) -> NumberedFields:
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        is_plain = path.suffix.lower() not in COMPRESSIONS
        given = str(path) if is_plain else pyarrow.BufferReader(_decompressed(path))
        table = pyarrow.parquet.read_table(given) if suffix == ".parquet" else _read_arrow(given)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _unreadable(source, error) from error
    try:
        rows = table.to_pylist()
    except Exception as error:  # of any class: days beyond 9999, unknown time zones, text that is no UTF-8
        raise _not_held(source, table, error) from error
    return iter(enumerate(map(remover_of_fill(table.schema), rows), start=1))


def _not_held(source: str, table: Any, error: Exception) -> DataError:
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.to_pylist()
        except Exception as cause:
            said = f"{source} has a value that cannot be read in column {name!r}, of type {column.type}: {cause}"
            return DataError(said, remedy="Take the column out, or write it as text, and export it again.")
    return _unreadable(source, error)


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


def _unreadable(source: str, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(
        f"{source} cannot be read: {reason}",
        cause="The file is damaged, is of another kind than its suffix says, or may not be read by this user.",
        remedy="Fetch or export it again, or check its permissions.",
    )
