"""What the server has sent and a site's compute thread has not taken yet."""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition
from typing import Any

import psutil

from parablock.clock import Clock
from parablock.wire.transport import MESSAGE_BYTES

PART_OF_MEMORY = 4
"""What waits takes a quarter of this machine's memory at most, beside the newest message."""
LOOK_S = 0.5
"""How often a connection that waits for room looks whether it is still there."""


class SiteInbox:
    """Messages and errors for the compute thread, in order; their bytes are counted.

    Args:
        clock: Of the run.
    """

    def __init__(self, clock: Clock) -> None:
        self._items, self._room = clock.mailbox(), Condition()
        self._most_bytes = psutil.virtual_memory().total // PART_OF_MEMORY
        self._is_open = True
        self.waiting_bytes = 0

    def put(self, message: Any, num_bytes: int) -> None:
        """Add a message that crossed the link as so many bytes; nothing, where nobody takes it any more."""
        cost = num_bytes + MESSAGE_BYTES
        with self._room:
            if self._is_open:
                self.waiting_bytes += cost
                self._items.put((message, cost))

    def fail(self, error: BaseException) -> None:
        """Add an error, which `take_until` raises."""
        self._items.put((error, 0))

    def take_until(self, deadline_s: float) -> Any:
        """Take the oldest message; None if the clock reaches `deadline_s` first."""
        if (item := self._items.get_until(deadline_s)) is None:
            return None
        message, cost = item
        with self._room:
            self.waiting_bytes -= cost
            self._room.notify_all()
        if isinstance(message, BaseException):
            raise message
        return message

    def await_room(self, is_connected: Callable[[], bool]) -> bool:
        """Wait while too much waits and the connection is there; return whether it was so.

        What is not read meanwhile is not confirmed, and the server keeps it.
        """
        has_waited = False
        with self._room:
            while self.waiting_bytes > self._most_bytes and self._is_open and is_connected():
                has_waited = True
                self._room.wait(LOOK_S)
        return has_waited

    def close(self) -> None:
        """Take no messages any more."""
        with self._room:
            self._is_open = False
            self._room.notify_all()
