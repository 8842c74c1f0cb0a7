"""Write files and folders whole or not at all, and keep one process in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from parablock.errors import StorageError
from parablock.printable import as_argument

NEW_FOLDER = "Give a new folder as --output-dir."
NEW_NAME = "Give another name with --output, or remove it."


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn failures to write below `path` into a `StorageError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise StorageError(
                f"{path} cannot be written: the disk is full",
                cause="The disk, or this user's share of it, has no room left.",
                remedy=f"Free some space, or choose another place.{_going_on(path)}",
            ) from None
        raise StorageError(
            f"{path} cannot be written: {error}",
            cause="The folder is missing, read-only, or not a folder, or its file system refuses such a file.",
            remedy="Choose another place, or make this one writable.",
        ) from None


def _is_full(error: OSError | SafetensorError) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    return bool(re.search(r"No space left|\d requested and \d+ written", str(error)))  # safetensors; numpy


def _going_on(path: Path) -> str:
    """Say how a run goes on that has begun in a folder above, and has no model yet."""
    for folder in (path, *path.parents):
        if (folder / "config.yaml").exists() and (folder / "checkpoints").is_dir():
            if not (folder / "model").exists():
                return f" `parablock resume {as_argument(folder)}` then goes on from the last checkpoint."
            break
    return ""


@contextmanager
def new_folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if the block fails, those that were made and are empty are taken away."""
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


def _check_way(path: Path, remedy: str) -> None:
    """Refuse a path that goes back (`..`) from a folder that is not there, with a `StorageError`."""
    for number, part in enumerate(path.parts):
        if part == ".." and not (before := Path(*path.parts[:number])).is_dir():
            raise StorageError(f"{path} leads through {before}, which is no folder", remedy=remedy)


def check_writable(folder: Path, option: str = "--output-dir") -> None:
    """Refuse a folder in which nothing can be written, or that cannot be made, with a `StorageError`."""
    with storage(folder):
        _check_way(folder, f"Give another {option}.")
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir():
        raise StorageError(f"{folder} cannot be a folder: {above} is a file", remedy=f"Give another {option}.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(
            f"{folder} cannot be written: {above} is read-only for this user",
            remedy=f"Give another {option}, or make this one writable.",
        )


def check_writable_file(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, with a `StorageError`; its folder is not made."""
    with storage(path):
        _check_way(path, f"Choose another place for {option}.")
        is_written_into = _is_written_into(path)
    if is_written_into:
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise StorageError(f"{path} cannot be written: {what}", remedy=f"Choose another place for {option}.")
    check_writable(path.parent, option)


def free_bytes(folder: Path) -> int:
    """Return the room on the disk of a folder, which need not be there yet."""
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(above).free


def check_absent(path: Path, remedy: str) -> None:
    """Refuse a path where something is already, with a `StorageError`."""
    with storage(path):
        _check_way(path, remedy)
        is_there = path.exists()
    if is_there:
        raise StorageError(f"{path} is there already", remedy=remedy)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that there is never half of it."""
    with write_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` to write a file to; it takes the name `path` when it is whole.

    If it cannot be written, the file that was there before is untouched. A link stays, and leads to the new file.
    A pipe or a device gets the content when it is whole, and stays what it is.
    """
    with storage(path):
        is_written_into = _is_written_into(path)
    if is_written_into:
        with storage(path), tempfile.TemporaryDirectory() as folder:
            beside = Path(folder) / path.name
            yield beside
            with beside.open("rb") as content, path.open("ab") as stream:
                shutil.copyfileobj(content, stream)
        return
    target = Path(os.path.realpath(path))
    beside, mode = _beside(target), None
    try:
        with storage(path):
            if target.is_file():  # who else may read it does not change, where files have modes
                mode = stat.S_IMODE(target.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR
                beside.unlink(missing_ok=True)
                os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, mode & ~(stat.S_IRWXG | stat.S_IRWXO)))
            yield beside
            sync(beside)
            if mode is not None:
                with suppress(OSError):
                    beside.chmod(mode)
            beside.replace(target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def _is_written_into(path: Path) -> bool:
    """Return whether a name is that of a pipe, a device, or an open file of a process, such as /dev/stdout."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        return True
    folder = path.absolute().parent
    return folder in (Path("/dev"), Path("/dev/fd")) or folder.is_relative_to("/proc")


@contextmanager
def write_folder_beside(folder: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to write files to; it takes the name `folder` when it is whole.

    If it cannot be written, nothing half-written is left, and no folder that was made for it. Unless it `replaces`
    what is there, a `folder` that was made meanwhile stays, and is a `StorageError`.
    """
    beside = _beside(folder)
    with storage(folder), new_folders(folder.parent):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            yield beside
            for path in beside.rglob("*"):
                sync(path)
            if replaces:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                check_absent(folder, NEW_FOLDER)
            beside.rename(folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last lines of a log; nothing if there is none."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return text.strip().splitlines()[-count:]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(
    folder: Path, remedy: str = "Wait for its end or stop it (Ctrl-C saves it), and resume then."
) -> Iterator[None]:
    """Lock a folder itself, against other processes, while the block lasts; the end of this process unlocks it.

    Raises:
        StorageError: Another process is at work there; `remedy` says what to do about it.
    """
    with storage(folder):
        place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another process is at work in {folder}",
                cause="The run there has not ended.",
                remedy=remedy,
            ) from None
        except OSError:
            pass  # a file system that knows no locks
        yield
    finally:
        os.close(place)
