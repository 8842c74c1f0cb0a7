"""Carrying messages, and counting what was carried.

A transport has two ends. The server's: `send` (returns at once) and `receive` (waits). A client's, used by
its communication thread alone: `attach`, `upload` and `download`, which take as long as the link does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from parablock.trace import Clock
from parablock.wire.link import Link


@dataclass(frozen=True)
class Parcel:
    """A message and the round that its bytes are counted for; only the message travels."""

    message: bytes
    round_index: int


@dataclass
class Traffic:
    """What crossed the links in one round.

    Attributes:
        uplink_bytes: Bytes up, all clients.
        downlink_bytes: Bytes down, all clients.
        seconds: For each client the seconds that its link was busy.
    """

    uplink_bytes: int = 0
    downlink_bytes: int = 0
    seconds: dict[int, float] = field(default_factory=dict)


class Ledger:
    """Bytes and seconds of every round, counted where they cross the link."""

    def __init__(self) -> None:
        self.rounds: dict[int, Traffic] = {}

    def of_round(self, round_index: int) -> Traffic:
        """Give the traffic of one round so far."""
        return self.rounds.setdefault(round_index, Traffic())

    def count(self, round_index: int, client_id: int, seconds: float, *, up: int = 0, down: int = 0) -> None:
        """Add one transfer."""
        traffic = self.of_round(round_index)
        traffic.uplink_bytes += up
        traffic.downlink_bytes += down
        traffic.seconds[client_id] = traffic.seconds.get(client_id, 0.0) + seconds


class ServerEnd(Protocol):
    """The server's end of a transport."""

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Hand a message over for a client; returns at once."""

    def receive(self, timeout_s: float, waiting_for: str) -> tuple[int, bytes]:
        """Wait for the next message of any client.

        Raises:
            StallError: When nothing has moved for `timeout_s`.
        """


class ClientEnd(Protocol):
    """A client's end of a transport; its communication thread owns it."""

    def attach(self, client_id: int, deliver: Callable[[Parcel], None]) -> None:
        """Say who takes what arrives for this client."""

    def upload(self, client_id: int, parcel: Parcel) -> None:
        """Carry a message up; returns when the server has it."""

    def download(self, client_id: int, parcel: Parcel) -> None:
        """Carry a message that has arrived at the link down; returns when the client has it."""


class MemoryTransport:
    """Both ends in one process, over shaped links.

    Args:
        clock: Whose time the links take.
        link: The link of each client.
        num_clients: How many there are.
    """

    def __init__(self, clock: Clock, link: Link, num_clients: int) -> None:
        self._clock, self._link = clock, link
        self._inbox = clock.mailbox()
        self._deliver: dict[int, Callable[[Parcel], None]] = {}
        self._early: dict[int, list[Parcel]] = {client_id: [] for client_id in range(num_clients)}
        self.ledger = Ledger()

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Put a message before the client's link; one that has not attached yet finds it there."""
        if client_id in self._deliver:
            self._deliver[client_id](parcel)
        else:
            self._early[client_id].append(parcel)

    def receive(self, timeout_s: float, waiting_for: str) -> tuple[int, bytes]:
        """Wait for the next message of any client."""
        item: Any = self._inbox.get(timeout_s, waiting_for)
        if isinstance(item, BaseException):
            raise item
        client_id, message = item
        return client_id, message

    def fail(self, error: BaseException) -> None:
        """Let the server's `receive` raise an error that a client ended with."""
        self._inbox.put(error)

    def attach(self, client_id: int, deliver: Callable[[Parcel], None]) -> None:
        """Deliver from now on, beginning with what was sent before."""
        for parcel in self._early.pop(client_id, []):
            deliver(parcel)
        self._deliver[client_id] = deliver

    def upload(self, client_id: int, parcel: Parcel) -> None:
        """Take the upload's time, then put the message into the server's inbox."""
        began = self._clock.now()
        self._clock.sleep(self._link.upload_s(len(parcel.message)))
        self.ledger.count(parcel.round_index, client_id, self._clock.now() - began, up=len(parcel.message))
        self._inbox.put((client_id, parcel.message))

    def download(self, client_id: int, parcel: Parcel) -> None:
        """Take the download's time."""
        began = self._clock.now()
        self._clock.sleep(self._link.download_s(len(parcel.message)))
        self.ledger.count(parcel.round_index, client_id, self._clock.now() - began, down=len(parcel.message))
