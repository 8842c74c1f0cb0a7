"""The memory of a long-lived server or trainer."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MOST = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let the C library keep for the next round what a round has freed: memory that is new has to be cleared.

    Source: mallopt(3). Other systems than Linux with glibc stay as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_ARENA_MAX, 1)):
            library.mallopt(parameter, value)
