"""An append-only log of what happened, whose lines are chained by hashes.

    audit.jsonl        a line an entry: time, kind, facts, previous, hash
    audit.jsonl.head   the number of lines, and the hash of the last one

`hash` is the SHA-256 of the line without it, and `previous` the hash of the line before. So a line that was
changed, removed, added or moved does not fit its neighbours, and the head shows lines that are missing at the end.
A line is on the disk when `append` returns. A process that dies in an append leaves half a line behind the head, or
a line that the head does not count: the next append removes the one and keeps the other.

Who can write to the folder can compute all hashes anew: the log finds accidents and careless changes. It protects
against more if the hash of its last line is kept where others cannot write.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from parablock.errors import StorageError
from parablock.storage.files import storage, sync, write_atomically

FILE_NAME = "audit.jsonl"
"""The log's name, in the folder of a site or of a run."""
START = "0" * 64
"""The `previous` of the first line."""
_KEYS = ("time", "kind", "facts", "previous", "hash")


@dataclass(frozen=True)
class AuditEntry:
    """One line of a log: when (UTC, ISO 8601), what kind of event, its facts, and the hash of the line."""

    time: str
    kind: str
    facts: dict[str, Any]
    hash: str


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`: the entries before the first bad line, the number of that line from 1, and why.

    `bad_line` is None if the whole log fits. `num_bytes` is the length of these lines; an append that was cut off
    may have left part of a line behind them.
    """

    entries: tuple[AuditEntry, ...]
    num_bytes: int
    bad_line: int | None = None
    problem: str = ""


class AuditLog:
    """A log that threads and processes may append to.

    Args:
        path: The file; made by the first `append`, readable for its owner alone.

    Raises:
        StorageError: The log that is there has been damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._lines, self._hash = 0, 0, START
        if path.exists():
            with self._locked() as descriptor:
                self._catch_up(descriptor)

    def append(self, kind: str, **facts: Any) -> str:
        """Write a line to the disk and return its hash; the facts are plain values that JSON can hold.

        Raises:
            StorageError: The disk is full, or the log has been damaged.
        """
        with self._locked() as descriptor:
            self._catch_up(descriptor)
            row = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "kind": kind,
                "facts": facts,
                "previous": self._hash,
            }
            hash_ = _hash_of(row)
            line = (_text_of(row | {"hash": hash_}) + "\n").encode()
            if not self._lines:
                self._write_head()  # from now on there is one
                with storage(self.path):
                    sync(self.path.parent)
            with storage(self.path):
                written = os.write(descriptor, line)
                if written != len(line):
                    raise OSError(f"{written} of {len(line)} bytes were written")
                os.fsync(descriptor)
            self._size, self._lines, self._hash = self._size + len(line), self._lines + 1, hash_
            self._write_head()
        return hash_

    @property
    def newest(self) -> str:
        """The hash of the last line that this object knows."""
        return self._hash

    def entries(self) -> tuple[AuditEntry, ...]:
        """Return all entries.

        Raises:
            StorageError: The log has been damaged.
        """
        return _sound(self.path).entries if self.path.exists() else ()

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file and keep everybody else out; a descriptor of its own keeps other threads out too."""
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            with storage(self.path):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if is_new:
                    sync(self.path.parent)
            yield descriptor
        finally:
            os.close(descriptor)

    def _catch_up(self, descriptor: int) -> None:
        """Take in what others have appended, and cut off an append that was not finished."""
        size = os.fstat(descriptor).st_size
        if size == self._size and self._lines:
            return
        if size < self._size or not self._read_on():
            found = _sound(self.path)
            self._size, self._lines = found.num_bytes, len(found.entries)
            self._hash = found.entries[-1].hash if found.entries else START
        if size > self._size:
            with storage(self.path):
                os.ftruncate(descriptor, self._size)
                os.fsync(descriptor)

    def _read_on(self) -> bool:
        """Take in the lines after the last one known, if they fit and end where the head says; return whether."""
        if not self._lines:
            return False
        with storage(self.path), self.path.open("rb") as file:
            file.seek(self._size)
            *lines, rest = file.read().split(b"\n")
        hash_ = self._hash
        for line in lines:
            try:
                entry, before = _parse(line)
            except (ValueError, RecursionError):
                return False
            if before != hash_:
                return False
            hash_ = entry.hash
        if rest or _read_head(self.path) != (self._lines + len(lines), hash_):
            return False
        self._size += sum(len(line) + 1 for line in lines)
        self._lines, self._hash = self._lines + len(lines), hash_
        return True

    def _write_head(self) -> None:
        write_atomically(head_of(self.path), json.dumps({"lines": self._lines, "hash": self._hash}) + "\n")


def head_of(path: Path) -> Path:
    """Return the file beside a log that holds its number of lines and its last hash."""
    return path.with_name(f"{path.name}.head")


def verify(path: Path) -> Verification:
    """Check every line of a log against its own hash, the line before and the head.

    Raises:
        StorageError: There is no such file, or it cannot be read.
    """
    with storage(path):
        content = path.read_bytes()
    entries: list[AuditEntry] = []
    num_bytes, previous = 0, START

    def bad(number: int, problem: str) -> Verification:
        return Verification(tuple(entries), num_bytes, number, problem)

    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            entry, before = _parse(line)
        except (ValueError, RecursionError) as error:
            return bad(number, str(error))
        if before != previous:
            return bad(number, "it does not follow the line before it")
        entries.append(entry)
        num_bytes, previous = num_bytes + len(line) + 1, entry.hash
    counted, hash_at_head = _read_head(path)
    if counted is None:
        return bad(1, f"{head_of(path).name} is missing or damaged")
    if counted > len(entries):
        return bad(len(entries) + 1, f"{counted} lines were written, and {len(entries)} whole ones are there")
    if hash_at_head != (entries[counted - 1].hash if counted else START):
        return bad(max(1, counted), f"its hash is not the one in {head_of(path).name}")
    return Verification(tuple(entries), num_bytes)


def _sound(path: Path) -> Verification:
    found = verify(path)
    if found.bad_line is not None:
        raise StorageError(
            f"{path}, line {found.bad_line}: {found.problem}",
            cause="Somebody or something has changed the log since it was written.",
            remedy="Put back a sound copy of the log and its .head; nothing is released beside a damaged log.",
        )
    return found


def _parse(line: bytes) -> tuple[AuditEntry, str]:
    """Return an entry, and the hash of the line before it, of a line that is exactly as `append` writes it."""
    row = json.loads(line.decode())
    if not isinstance(row, dict) or tuple(row) != _KEYS or not isinstance(row["facts"], dict):
        raise ValueError("it is no entry of a log")
    if _hash_of({key: row[key] for key in _KEYS[:-1]}) != row["hash"] or _text_of(row).encode() != line:
        raise ValueError("it has changed since it was written")
    return AuditEntry(row["time"], row["kind"], row["facts"], row["hash"]), row["previous"]


def _text_of(row: dict[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":"))


def _hash_of(row: dict[str, Any]) -> str:
    return sha256(_text_of(row).encode()).hexdigest()


def _read_head(path: Path) -> tuple[int | None, str]:
    """Return the number of lines and the last hash; no lines of a log that has no head and is empty, else None."""
    if not head_of(path).exists() and not path.stat().st_size:
        return 0, START
    try:
        head = json.loads(head_of(path).read_text(encoding="utf-8"))
        return int(head["lines"]), str(head["hash"])
    except (OSError, ValueError, LookupError, TypeError):
        return None, ""
