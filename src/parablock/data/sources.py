"""Data sources: rows from JSON lines, Parquet, or a dataset on the Hugging Face hub.

A row keeps its file and line, so that every later error can name them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.errors import DataError
from parablock.hub import use_cache_when_offline

SUFFIXES = (".jsonl", ".json", ".parquet")
_REFUSED_SUFFIXES = (".csv", ".txt")
_LINES_REMEDY = (
    "A .jsonl or .json file holds one JSON object per line, in UTF-8; "
    "a .json file may also be one array of objects."
)
_BETWEEN_ITEMS = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data source.

    Args:
        fields: Field name → value; nobody changes it.
        source: The file or the dataset name.
        line: Line of the file, or position in a Parquet file or a dataset, from 1.
    """

    fields: dict[str, Any]
    source: str
    line: int

    @property
    def place(self) -> str:
        """The source and line of the row, for error messages."""
        return f"{self.source}, line {self.line}"


def load_rows(source: str, *, split: str) -> list[Row]:
    """Load all rows of one source, in its order; at least one.

    Args:
        source: A local `.jsonl`, `.json` or `.parquet` file, or a dataset of the hub, `name` or `name:config`.
            A path that exists, has the suffix of a file, or starts with `.`, `/` or `~` is a file.
        split: The split of a hub dataset (`train`, `test`); a local file is one split already.

    Raises:
        DataError: The source is missing, a folder, of an unknown suffix, unreadable, broken or empty.
    """
    path = Path(source).expanduser()
    if _is_path(source, path):
        _check_file(source, path)
        rows = _read_parquet(source, path) if path.suffix.lower() == ".parquet" else _read_json(source, path)
    else:
        rows = _read_hub(source, split=split)
    if not rows:
        raise DataError(f"{source} is empty: it holds no row.", remedy="Give a source with at least one example.")
    return rows


def rows_sha256(rows: Iterable[Row]) -> str:
    """Hash the fields of rows, in the order of the rows: 64 hexadecimal digits.

    The files of the rows and the order of the fields in a row have no effect.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _is_path(source: str, path: Path) -> bool:
    suffixes = (*SUFFIXES, *_REFUSED_SUFFIXES)
    return source.startswith((".", "/", "~")) or path.suffix.lower() in suffixes or path.exists()


def _check_file(source: str, path: Path) -> None:
    if path.is_dir():
        raise DataError(
            f"{source} is a folder, not a file.",
            remedy="List the files in it one by one; a dataset of the hub is named in full, owner/name.",
        )
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{source} has the suffix {path.suffix or 'of no known file'!r}, which cannot be read.",
            remedy=f"Supported are {', '.join(SUFFIXES)}, or the name of a dataset on the hub.",
        )
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise DataError(
            f"{source} does not exist.",
            cause=f"Relative paths start from {Path.cwd()}.",
            remedy=f"Check the path.{hint}",
        )


def _read_json(source: str, path: Path) -> list[Row]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(source, error) from error
    if path.suffix.lower() == ".json" and raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return _parse_array(source, raw)
    return [
        _make_row(source, line, _parse(source, line, text))
        for line, text in enumerate(raw.split(b"\n"), start=1)
        if text.strip()
    ]


def _parse_array(source: str, raw: bytes) -> list[Row]:
    _parse(source, 1, raw)  # the whole text is valid from here on; the rest only finds the lines
    text, decoder = raw.decode("utf-8-sig"), json.JSONDecoder()
    rows: list[Row] = []
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    while True:
        start = _BETWEEN_ITEMS.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too
        line += text.count("\n", at, start)
        if text[start] == "]":
            return rows
        value, at = decoder.raw_decode(text, start)
        rows.append(_make_row(source, line, value))
        line += text.count("\n", start, at)


def _parse(source: str, line: int, text: bytes) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, reason = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except UnicodeDecodeError as error:
        reason = f"byte 0x{error.object[error.start]:02x} at position {error.start} is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    raise DataError(f"{source}, line {line} is not JSON: {reason}.", remedy=_LINES_REMEDY)


def _make_row(source: str, line: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{source}, line {line} holds a value of type {type(value).__name__}, not an object.",
            remedy=_LINES_REMEDY,
        )
    return Row(value, source, line)


def _read_parquet(source: str, path: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets, and is slow to import
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _unreadable(source, error) from error
    return [Row(value, source, line) for line, value in enumerate(values, start=1)]


def _unreadable(source: str, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(
        f"{source} cannot be read: {reason}",
        cause="The file is damaged, is of another kind than its suffix says, or may not be read by this user.",
        remedy="Fetch or export it again, or check its permissions.",
    )


def _read_hub(source: str, *, split: str) -> list[Row]:
    import datasets  # slow to import

    name, _, config = source.partition(":")
    try:
        with use_cache_when_offline():
            values = datasets.load_dataset(name, config or None, split=split)
    except OSError as error:  # not found, gated, or no network
        raise DataError(
            f"{source!r} is neither a file here nor reachable as a dataset on the hub: {error}",
            cause=f"Files are looked for from {Path.cwd()}; the hub needs a network or a filled cache.",
            remedy=f"Give a {', '.join(SUFFIXES)} file, or check the name (owner/name or owner/name:config).",
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"Split {split!r} of dataset {source!r} cannot be loaded: {error}",
            cause="The configuration (after the colon) or the split does not exist, or its files are broken.",
            remedy="Name one that does: owner/name:config.",
        ) from error
    return [Row(dict(value), source, line) for line, value in enumerate(values, start=1)]
