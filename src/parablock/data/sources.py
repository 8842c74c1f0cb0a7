"""Data sources: rows from files, folders and wildcards, or a dataset on the Hugging Face hub.

A row keeps its file and line, so that every later error can name them.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.data.file_kinds import COMPRESSIONS, check_is_file, suffix_of
from parablock.data.readers import SUFFIXES, NumberedFields, read_file, remover_of_fill
from parablock.errors import DataError, check_enterable, did_you_mean, reading
from parablock.hub import use_cache_when_offline

_REFUSED_SUFFIXES = {
    ".txt": 'Write each text as a line of JSON, such as {"text": "…"}, in a .jsonl file.',
    ".xlsx": "Save the sheet as CSV in UTF-8.",
    ".xls": "Save the sheet as CSV in UTF-8.",
    ".ods": "Save the sheet as CSV in UTF-8.",
    ".zip": "Unpack it, and name the folder.",
    ".tar": "Unpack it, and name the folder.",
}
"""Suffix of a file that is not read → what to do instead."""

_SAVED_SPLITS, _SAVED_SET = "dataset_dict.json", "dataset_info.json"
"""What `datasets` writes into the folder of several splits, and into that of one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data source.

    Args:
        fields: Field name → value; nobody changes it.
        source: The file or the dataset name.
        line: Line of the file, or position in a table or a dataset, from 1.
    """

    fields: dict[str, Any]
    source: str
    line: int

    @property
    def place(self) -> str:
        """The source and line of the row, for error messages."""
        return f"{self.source}, line {self.line}"


Check = Callable[[Sequence[Row]], None]
"""What raises a DataError for the first wrong row of a file."""


def load_rows(
    source: str, *, split: str, columns: Mapping[str, str] | None = None, check: Check = lambda _: None
) -> list[Row]:
    """Load all rows of one source, in its order; at least one. See `load_files`."""
    return [row for rows in load_files(source, split=split, columns=columns, check=check) for row in rows]


def load_files(
    source: str, *, split: str, columns: Mapping[str, str] | None = None, check: Check = lambda _: None
) -> list[list[Row]]:
    """Load the rows of each file of one source, in its order; each file has at least one.

    Args:
        source: A local file of a suffix in `SUFFIXES`, perhaps compressed; a folder of such files; a pattern with
            wildcards, in which `**` stands for any folders; or a dataset of the hub, `name` or `name:config`.
            A path that exists, has the suffix of a file, or starts with `.`, `/` or `~` is local. Files of a
            folder or a pattern come in alphabetical order.
        split: The split of a dataset (`train`, `test`); a local file is one split already.
        columns: Field that a format knows → the column of the source that holds it.
        check: Called with the rows of each file, or with those before the first that cannot be read. So the first
            wrong row is the one that is named, whatever is wrong with it.

    Raises:
        DataError: The source is missing, of an unknown suffix, unreadable, broken or empty, or lacks a column; or
            what `check` raises.
    """
    if is_local(source):
        names = _find_files(source, split)
        return [_checked(name, (Row(f, name, n) for n, f in _read(name)), columns, check) for name in names]
    return [_checked(source, iter(_read_hub(source, split=split)), columns, check)]


def may_be_several(source: str) -> bool:
    """Return whether a source may stand for more than one file: a folder, or a pattern."""
    with reading(source, DataError):
        return is_local(source) and (_is_pattern(source) or Path(source).expanduser().is_dir())


def describe_ignored(source: str, *, split: str) -> list[str]:
    """Name what stands in a folder and is not read, in a line of text; none for any other source."""
    path = Path(source).expanduser()
    if not (is_local(source) and path.is_dir()):
        return []
    read = {Path(name) for name in _find_files(source, split)}
    path = path / split if (path / _SAVED_SPLITS).exists() else path
    if (path / _SAVED_SET).exists():  # what `datasets` writes beside its rows
        return []
    rest = sorted(child for child in path.iterdir() if child not in read and not child.name.startswith("."))
    names = [f"{child.name}/" if child.is_dir() else child.name for child in rest]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"not read in {source}: {', '.join(names[:5])}{more}"] if names else []


def absolute(source: str) -> str:
    """Return the full path of files or folders that are here, and any other name as it is."""
    path = Path(source).expanduser()
    with reading(source, DataError):
        if path.exists():
            return str(path.resolve())
    here = str(Path.cwd() / path)
    return here if _is_pattern(source) and glob.glob(here, recursive=True) else source  # noqa: PTH207


def rows_sha256(rows: Iterable[Row]) -> str:
    """Hash the fields of rows, in the order of the rows: 64 hexadecimal digits.

    The files of the rows and the order of the fields in a row have no effect.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_canonical(row) + b"\n")
    return digest.hexdigest()


def check_places(sources: Iterable[str], *, split: str) -> None:
    """Refuse local sources that are missing or of an unknown suffix, with a DataError; nothing is read."""
    for source in sources:
        if is_local(source):
            _find_files(source, split)


def _canonical(row: Row) -> bytes:
    return json.dumps(row.fields, sort_keys=True, default=repr).encode()


def is_local(source: str) -> bool:
    """Return whether a source is of files here, and no name of the hub."""
    path = Path(source).expanduser()
    suffixes = (*SUFFIXES, *_REFUSED_SUFFIXES, *COMPRESSIONS)
    is_written_as_path = (
        source.startswith((".", "/", "~")) or path.suffix.lower() in suffixes or _is_pattern(source)
    )
    with reading(source, DataError):
        return is_written_as_path or path.exists() or path.is_symlink()


def _is_pattern(source: str) -> bool:
    return glob.has_magic(source) and not Path(source).expanduser().exists()


def _find_files(source: str, split: str) -> list[str]:
    """Return the files of a local source."""
    with reading(source, DataError):
        return _files_of(source, Path(source).expanduser(), split)


def _files_of(source: str, path: Path, split: str) -> list[str]:
    if _is_pattern(source):
        fixed = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        if fixed.is_dir():  # else `glob` would find nothing in it
            check_enterable(source, fixed, DataError)
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207  # takes absolute patterns too
        found = sorted(name for name in names if _is_data(Path(name)))
        if found:
            return found
        raise DataError(
            f"{source} matches no file.",
            cause=f"Relative patterns start from {Path.cwd()}; files end with {', '.join(SUFFIXES)}.",
            remedy="Check the pattern; `**` stands for any folders, as in data/**/*.jsonl.",
        )
    if path.is_dir():
        return _files_of_folder(source, path, split)
    _check_file(source, path)
    return [source]


def _is_data(path: Path) -> bool:
    return path.is_file() and suffix_of(path) in SUFFIXES and not path.name.startswith(".")


def _files_of_folder(source: str, path: Path, split: str) -> list[str]:
    check_enterable(source, path, DataError)
    if (path / _SAVED_SPLITS).exists():
        if not (path / split).is_dir():
            splits = sorted(child.name for child in path.iterdir() if child.is_dir())
            raise DataError(
                f"{source} is a saved dataset without a split {split!r}; it has {', '.join(splits)}.",
                remedy=f"Name the folder of a split, such as {path / (splits[0] if splits else 'train')}.",
            )
        return _files_of_folder(f"{source}/{split}", path / split, split)
    found = sorted(child for child in path.iterdir() if _is_data(child))
    if (path / _SAVED_SET).exists():
        found = [c for c in found if c.suffix == ".arrow" and not c.name.startswith("cache-")]  # maps, filters
    if not found:
        below = next((str(child.parent) for child in sorted(path.rglob("*")) if _is_data(child)), "")
        raise DataError(
            f"{source} is a folder without a data file.",
            cause=f"Data files end with {', '.join(SUFFIXES)}, perhaps followed by {', '.join(COMPRESSIONS)}.",
            remedy=f"There are some in {below}: name that, or {path}/**/*." if below else "Name another folder.",
        )
    return [str(child) for child in found]


def _check_file(source: str, path: Path) -> None:
    check_is_file(source, path)
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{source} has the suffix {suffix!r}, which cannot be read."
            if suffix
            else f"{source} has no suffix, by which files are told apart.",
            cause=f"Supported are {', '.join(SUFFIXES)}, or the name of a dataset on the hub.",
            remedy=_REFUSED_SUFFIXES.get(suffix, "Convert it to one of these."),
        )
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{source} is a link to {path.readlink()}, and nothing is there.",
            cause="The file was moved or removed, its disk is not mounted, or the link leads back to itself.",
            remedy="Make the link anew, or name the file itself.",
        )
    if not path.exists():
        raise DataError(
            f"{source} does not exist.",
            cause=f"Relative paths start from {Path.cwd()}.",
            remedy=f"Check the path. {did_you_mean(path)}".strip(),
        )


def _read(name: str) -> NumberedFields:
    return read_file(name, Path(name).expanduser())


def _checked(name: str, read: Iterator[Row], columns: Mapping[str, str] | None, check: Check) -> list[Row]:
    rows: list[Row] = []
    try:
        rows.extend(renamed(row, columns) if columns else row for row in read)
    except DataError:
        if rows:
            check(rows)
        raise
    if not rows:
        raise DataError(f"{name} is empty: it holds no row.", remedy="Give a source with at least one example.")
    check(rows)
    return rows


def renamed(row: Row, columns: Mapping[str, str], *, may_lack: Collection[str] = ()) -> Row:
    """Return a row with the names that a format knows.

    Args:
        row: As it was read.
        columns: Field that a format knows → the column that holds it.
        may_lack: Fields whose columns the row may lack.

    Raises:
        DataError: It lacks another one.
    """
    missing = [column for name, column in columns.items() if column not in row.fields and name not in may_lack]
    if missing:
        raise DataError(
            f"{row.place} has no column {missing[0]!r}, which data.columns names; it has "
            f"{', '.join(row.fields) or '(none)'}.",
            remedy=f"Correct data.columns, or the file.{_near(missing[0], row.fields)}",
        )
    columns = {name: column for name, column in columns.items() if column in row.fields}
    taken = set(columns.values()) | set(columns)
    rest = {name: value for name, value in row.fields.items() if name not in taken}
    return Row({name: row.fields[column] for name, column in columns.items()} | rest, row.source, row.line)


def renamed_as_in_run(row: Row, columns: Mapping[str, str], read: Callable[[Row], object]) -> Row:
    """Return a row with the names of a run's columns if it has them all, else as it is.

    A row that `read` cannot read so, and can as it is, stays as it is, too: its names are those that formats have.
    """
    if not columns or any(column not in row.fields for column in columns.values()):
        return row
    named = renamed(row, columns)
    with suppress(DataError):
        read(named)
        return named
    with suppress(DataError):
        read(row)
        return row
    return named


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _read_hub(source: str, *, split: str) -> list[Row]:
    import datasets  # slow to import

    name, _, config = source.partition(":")
    try:
        with use_cache_when_offline():
            values = datasets.load_dataset(name, config or None, split=split)
    except OSError as error:  # not found, gated, or no network
        raise DataError(
            f"{source!r} is neither a file here nor reachable as a dataset on the hub: "
            + " ".join(str(error).split()),
            cause=f"Files are looked for from {Path.cwd()}; the hub needs a network or a filled cache.",
            remedy=f"Give a {', '.join(SUFFIXES)} file, or check the name (owner/name or owner/name:config).",
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"Split {split!r} of dataset {source!r} cannot be loaded: {' '.join(str(error).split())}",
            cause="The configuration (after the colon) or the split does not exist, or its files are broken.",
            remedy="Name one that does: owner/name:config.",
        ) from error
    without_fill = remover_of_fill(values.features.arrow_schema)
    return [Row(without_fill(value), source, line) for line, value in enumerate(values, start=1)]
