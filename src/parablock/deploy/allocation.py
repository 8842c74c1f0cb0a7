"""The memory of a long-lived server or trainer: kept between rounds, in large pages, with libraries that stay.

Memory that is new has to be cleared by the kernel, and a copy between small pages of a virtual machine may cost ten
times one between large ones. The C library reads its settings when a process begins, so the process begins again.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SETTINGS = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}
"""Environment variables of glibc; see mallopt(3) and its manual on tunables. Other libraries ignore them."""


def with_kept_memory(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the settings; those that its owner has made stay."""
    return {**SETTINGS, **environment}


def keep_memory() -> None:
    """Begin this command again with the settings, unless it has them, or is called within another program."""
    arguments = sys.argv[1:]
    is_command = sys.orig_argv[len(sys.orig_argv) - len(arguments) :] == arguments and bool(arguments)
    if sys.platform.startswith("linux") and is_command and not SETTINGS.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, with_kept_memory(os.environ))


@contextmanager
def libraries_load() -> Iterator[None]:
    """Let nobody look for garbage in libraries that load, nor in what they have loaded, ever.

    They have a million objects, none of which is garbage. Looking them through takes a tenth of the time that they
    load in, and afterwards a third of a second each of the next three times.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()
