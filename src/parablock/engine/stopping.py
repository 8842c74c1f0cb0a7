"""A stop that need not wait for who is not there.

A run that is asked to stop does so at its next round, saved as it is then. Where the round waits for a client that
is gone, that may be long; then it stops at once, and goes on from its last checkpoint. A client that is there, and
only takes its time, is waited for: it may be all that lacks to the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol


class StopAsked(BaseException):
    """The run is asked to stop, and waits for clients that are gone; never seen by users.

    Args:
        gone: Who.
    """

    def __init__(self, gone: Iterable[int]) -> None:
        self.gone = tuple(gone)
        names = ", ".join(f"client {client_id}" for client_id in self.gone)
        super().__init__(f"asked to stop, and no longer waiting for {names}: gone, or silent for long")


class Presence(Protocol):
    """What knows who is there."""

    def is_there(self, client_id: int) -> bool:
        """Tell whether a client is known to be gone, or silent beyond its time."""


def look_for_a_stop(
    presence: Presence, num_clients: int, asked_to_stop: Callable[[], bool]
) -> Callable[[Collection[int] | None], None]:
    """Give what a server's end does while it waits for some clients; None: for anybody.

    Raises:
        StopAsked: By what is given, where it is time to stop.
    """

    def look(from_clients: Collection[int] | None) -> None:
        awaited = range(num_clients) if from_clients is None else from_clients
        gone = [client_id for client_id in awaited if not presence.is_there(client_id)]
        if gone and asked_to_stop():
            raise StopAsked(gone)

    return look
