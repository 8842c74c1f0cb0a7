"""Atomic file writes, a lock on a folder, and write errors that say what to do."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from parablock.errors import StorageError


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path` into a `StorageError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        raise StorageError(
            f"{path} cannot be written: {'the disk is full' if full else error}",
            cause=(
                "The disk, or this user's share of it, has no room left."
                if full
                else "The folder is missing, read-only, or not a folder, or its file system refuses such a file."
            ),
            remedy=(
                "Free some space; `parablock resume` goes on with a run that has begun, from its last checkpoint."
                if full
                else "Choose another --output-dir, or make this one writable."
            ),
        ) from None


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with write_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; the finished file is renamed to `path`.

    Raises:
        StorageError: The file cannot be written; the one that was there before is untouched.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with storage(path):
            yield beside
            flush_to_disk(beside)
            beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def flush_to_disk(path: Path) -> None:
    """Make a file or a folder outlive a power cut (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(
    folder: Path, remedy: str = "Wait for its end or stop it (Ctrl-C saves it), and resume then."
) -> Iterator[None]:
    """Lock a folder against other processes while the block lasts; the end of this process unlocks it too.

    Args:
        folder: The folder; the lock is on the folder itself and needs no file.
        remedy: What to do about a process that holds the lock.

    Raises:
        StorageError: Another process is at work there.
    """
    with storage(folder):
        place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another process is at work in {folder}",
                cause="The run there has not ended; two at once would write into the same files.",
                remedy=remedy,
            ) from None
        except OSError:
            pass  # a file system that knows no locks
        yield
    finally:
        os.close(place)
