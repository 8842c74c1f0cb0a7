"""The exception tree: every error that ParaBlock raises on purpose.

    ParaBlockError                 exit code 1: the run failed
    ├── InputError                 exit code 2: the user's input is wrong
    │   ├── ConfigError            a configuration key or value (all problems at once)
    │   ├── DataError              a data file, a row, a partition
    │   ├── ModelError             a model folder, its architecture, its tokenizer
    │   ├── CheckpointError        a run directory that cannot be resumed
    │   ├── StorageError           the disk: full, read-only, not a folder
    │   ├── LedgerError            a site's ledger that lacks what the site has released
    │   └── PolicyError            a run, or a round of it, that the site's policy forbids
    ├── TrainingError              a loss or an update that is not finite
    ├── StoppedByUserError         exit code 130: Ctrl-C, with everything saved
    └── WireError                  bytes that crossed the link
        ├── CodecError             not a message, truncated, altered, or another protocol version
        ├── MaskingError           masks that cannot be taken off a round's sum; the round is void
        ├── LinkError              a transfer that was cut and has to be repeated
        └── StallError             a transfer or a peer that makes no progress

An error says what happened, with the values; the likely cause; and the remedy. These are separate attributes, so
that the command line can print them as one block. Each of them is one line, whatever names of files are in it.
"""

from __future__ import annotations

import difflib
import errno
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from parablock.printable import counted, in_one_line


class ParaBlockError(Exception):
    """The root of the tree.

    Args:
        what: What happened, with the values that matter.
        cause: The likely reason. Empty where `what` says it all.
        remedy: What to do about it. Empty where nothing can be done.
        lines: What stands below `what` and belongs to it, such as problems or the end of a log.

    Attributes:
        what: The lines that say what happened; cause, remedy: a line each. Escapes stand for control characters.
        told: What a server may know of it: its kind, and no path, name or text of the site.
    """

    exit_code = 1
    told = "it cannot take part"

    def __init__(self, what: str, *, cause: str = "", remedy: str = "", lines: Sequence[str] = ()) -> None:
        self.what = "\n".join(map(in_one_line, (what, *lines)))
        self.cause, self.remedy = in_one_line(cause), in_one_line(remedy)
        super().__init__("\n".join(part for part in (self.what, self.cause, self.remedy) if part))

    @property
    def in_one_line(self) -> str:
        """What is told in a log: sentences, one after the other."""
        parts = [part.strip() for part in str(self).split("\n")]
        ended = [part if part.endswith((".", ":", "?", "!")) else f"{part}." for part in parts[:-1]]
        return " ".join([*ended, *parts[-1:]])


def did_you_mean(path: Path, *, among: str = "*") -> str:
    """Return a question that names what lies beside a path and is spelt almost like it; "" if nothing is.

    `among` is a pattern for what counts: `*/a.txt` leaves the folders that hold such a file.
    """
    siblings = set[str]()
    with suppress(OSError):  # a folder that may not be read, or is gone, must not hide the error that is told
        siblings |= {found.relative_to(path.parent).parts[0] for found in path.parent.glob(among)}
    near = difflib.get_close_matches(path.name, siblings - {path.name}, n=1)  # its own name is that of a dead link
    return f"Did you mean {path.parent / near[0]}?" if near else ""


class InputError(ParaBlockError):
    """The user's input is wrong; running again without a change fails again."""

    exit_code = 2


class ConfigError(InputError):
    """One or more configuration problems, reported together: a line for each, starting with the key path.

    `source` is the file or command line that has the problems.
    """

    told = "its configuration does not fit the run"

    def __init__(self, problems: Sequence[str], *, source: str = "the configuration") -> None:
        self.problems = tuple(problems)
        lines = [f"  - {problem}" for problem in self.problems]
        super().__init__(f"{source} has {counted(len(lines), 'problem')}:", lines=lines)


@contextmanager
def reading(source: str | Path, kind: type[InputError]) -> Iterator[None]:
    """Turn what the system refuses in the block into an error of a kind; see `unread`."""
    try:
        yield
    except OSError as error:
        raise unread(source, error, kind) from error


def unread(source: str | Path, error: OSError, kind: type[InputError] = InputError) -> InputError:
    """Return the error of something that the system does not let be read, with the system's own reason.

    Args:
        source: What the user has named.
        error: What the system has raised; its file is `source`, or in it.
        kind: The class of the error.
    """
    what = f"{source} cannot be read: {error.strerror or error}"
    if not isinstance(error, PermissionError):
        return kind(what, remedy="Check the disk or the share that it is on, or give a copy.")
    path = Path(error.filename if isinstance(error.filename, str) else source)
    closed = next((folder for folder in reversed(path.parents) if not os.access(folder, os.X_OK)), path)
    right = "enter the folder" if closed != path or path.is_dir() else "read the file"
    return kind(
        f"{source} cannot be read: {error.strerror}",
        cause=f"This user may not {right} {closed}.",
        remedy=f"Allow it (chmod u+rX {shlex.quote(str(closed))}), or ask its owner to.",
    )


def check_enterable(source: str | Path, folder: Path, kind: type[InputError]) -> None:
    """Refuse a folder that this user may not list or enter, where libraries would find it empty."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise unread(source, PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder)), kind)


def no_file(path: Path) -> str:
    """Return what a path leads to, such as "a pipe", where reading may wait for ever; "" for a file or folder."""
    kinds = {"a pipe": path.is_fifo(), "a socket": path.is_socket()}
    kinds["a device"] = path.is_char_device() or path.is_block_device()
    return next((kind for kind, is_it in kinds.items() if is_it), "")


def as_own_error(error: ParaBlockError | PermissionError) -> ParaBlockError:
    """Return an error to tell the user; a PermissionError of anything but reading is raised again."""
    if isinstance(error, ParaBlockError):
        return error
    if not isinstance(error.filename, str) or os.access(error.filename, os.R_OK):
        raise error
    return unread(error.filename, error)


class DataError(InputError):
    """A data file, a row of it, or the way it is split."""

    told = "its data cannot be read"


class ModelError(InputError):
    """A model that cannot be read, is of an unknown architecture, or does not fit the run."""

    told = "its model is not the one of the run"


class CheckpointError(InputError):
    """A run directory that cannot be resumed, with the reason."""


class StorageError(InputError):
    """The output folder cannot be written: the disk is full or read-only, or the path is not a folder."""

    told = "its disk cannot be written"


class LedgerError(InputError):
    """The ledger of a site lacks updates of it that the server has."""

    told = "LEDGER its own ledger lacks updates that it has released"


class PolicyError(InputError):
    """What a run or a round asks for is forbidden by the policy of this site; `keys` are those of the policy."""

    def __init__(self, what: str, *, keys: Sequence[str], remedy: str = "") -> None:
        self.keys = tuple(keys)
        self.told = f"POLICY its policy forbids it: {', '.join(self.keys)}"
        super().__init__(what, remedy=remedy)


class TrainingError(ParaBlockError):
    """Training failed: a loss or an update is not finite."""

    told = "its training failed"


class StoppedByUserError(ParaBlockError):
    """The user has stopped it, and what is done is saved."""

    exit_code = 130


class WireError(ParaBlockError):
    """A failure between a client and the server."""


class CodecError(WireError):
    """Bytes that are not a whole, unaltered message of this protocol version."""

    told = "it could not read a message of the server"


class MaskingError(WireError):
    """The masks of a round's sum cannot be taken off, so that the round is void.

    `client_id` is the client at fault; None if nobody can be named.
    """

    def __init__(self, what: str, *, cause: str = "", client_id: int | None = None) -> None:
        self.client_id = client_id
        super().__init__(what, cause=cause)


class LinkError(WireError):
    """A transfer that was cut or arrived altered; its sender waits `retry_after_s` seconds and repeats it."""

    def __init__(self, what: str, *, retry_after_s: float = 0.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what)


class StallError(WireError):
    """Nothing made progress for longer than `federation.stall_timeout_s`."""
