"""Every error that ParaBlock raises on purpose.

    ParaBlockError                 exit code 1: the run failed
    ├── InputError                 exit code 2: something that the user gave is wrong
    │   ├── ConfigError            a configuration key or value (all problems at once)
    │   ├── DataError              a data file, a row, a partition
    │   ├── ModelError             a model folder, its architecture, its tokenizer
    │   ├── CheckpointError        a run directory that cannot be resumed
    │   └── StorageError           the disk: full, read-only, not a folder
    ├── TrainingError              a loss or an update that is not finite
    └── WireError                  bytes that crossed the link
        ├── CodecError             not a message, truncated, altered, or another protocol version
        ├── LinkError              a transfer that was cut; it is made again
        └── StallError             a transfer or a peer that stopped moving

An error says what happened, with the values; whose fault it likely is; and what to do. The three are
kept apart (`what`, `cause`, `remedy`) so that the command line can print them as one block.
"""

from __future__ import annotations

from collections.abc import Sequence


class ParaBlockError(Exception):
    """The root of the tree.

    Args:
        what: What happened, with the values that matter.
        cause: The likely reason and whose it is. May be empty where `what` says it all.
        remedy: What to do about it. May be empty where nothing can be done.
    """

    exit_code = 1

    def __init__(self, what: str, *, cause: str = "", remedy: str = "") -> None:
        self.what, self.cause, self.remedy = what, cause, remedy
        super().__init__("\n".join(part for part in (what, cause, remedy) if part))


class InputError(ParaBlockError):
    """Something that the user gave is wrong; running again without a change fails again."""

    exit_code = 2


class ConfigError(InputError):
    """One or more configuration problems, reported together.

    Args:
        problems: One line for each, starting with the key path (`train.num_local_steps: …`).
        source: The file or command line that holds them.
    """

    def __init__(self, problems: Sequence[str], *, source: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source} has {count}:\n{lines}")


class DataError(InputError):
    """A data file, a row of it, or the way it is split."""


class ModelError(InputError):
    """A model that cannot be read, is of an unknown architecture, or does not fit the run."""


class CheckpointError(InputError):
    """A run directory that cannot be resumed, with the reason."""


class StorageError(InputError):
    """The place where results are written: full, read-only, or not a folder."""


class TrainingError(ParaBlockError):
    """Training went wrong by itself: a loss or an update that is not finite."""


class WireError(ParaBlockError):
    """Bytes between a client and the server."""


class CodecError(WireError):
    """Bytes that are not a whole, unaltered message of this protocol version."""


class LinkError(WireError):
    """A transfer that was cut or arrived altered; whoever made it makes it again.

    Args:
        what: What happened.
        retry_after_s: Seconds until it is worth another try.
    """

    def __init__(self, what: str, *, retry_after_s: float = 0.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what)


class StallError(WireError):
    """Somebody waited for longer than `federation.stall_timeout_s` without any progress."""
