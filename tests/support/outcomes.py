"""Programs that run to their end, and what came of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    stdout: str
    stderr: str


def ended(
    command: Iterable[object],
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    given: str | None = None,
    before: Callable[[], None] | None = None,
) -> Outcome:
    """Run a program, with a wide terminal so that no line is broken.

    Args:
        command: Its name and arguments.
        folder: Where.
        environment: Variables beside those of this process.
        given: Its standard input.
        before: Called in the new process before the program starts.
    """
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **(environment or {})},
        input=given,
        preexec_fn=before,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
