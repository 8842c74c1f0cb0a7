"""Carrying messages, and counting what was carried.

A transport has two ends. The server's: `send` (returns at once) and `receive` (waits). A client's, used by
its communication thread alone: it is told what arrives (`attach`), asks how long a transfer takes, lets that
time pass, and then says that it is done. The two directions of a link do not slow each other down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from parablock.clock import Clock


@dataclass(frozen=True)
class Parcel:
    """A message and the round that its bytes are counted for; only the message travels."""

    message: bytes
    round_index: int


@dataclass
class Traffic:
    """What crossed the links in one round.

    Attributes:
        up: For each client its bytes up and the seconds that they took.
        down: For each client its bytes down and the seconds that they took.
    """

    up: dict[int, tuple[int, float]] = field(default_factory=dict)
    down: dict[int, tuple[int, float]] = field(default_factory=dict)

    @property
    def uplink_bytes(self) -> int:
        """Bytes up, all clients."""
        return sum(wire_bytes for wire_bytes, _ in self.up.values())

    @property
    def downlink_bytes(self) -> int:
        """Bytes down, all clients."""
        return sum(wire_bytes for wire_bytes, _ in self.down.values())

    def seconds(self, client_id: int) -> float:
        """Seconds that a client's link was busy."""
        return self.up.get(client_id, (0, 0.0))[1] + self.down.get(client_id, (0, 0.0))[1]


class Ledger:
    """Bytes and seconds of every round, counted where they cross the link."""

    def __init__(self) -> None:
        self._rounds: dict[int, Traffic] = {}

    def of_round(self, round_index: int) -> Traffic:
        """Give the traffic of one round so far."""
        return self._rounds.setdefault(round_index, Traffic())

    def count_up(self, parcel: Parcel, client_id: int, seconds: float) -> None:
        """Add an upload."""
        _add(self.of_round(parcel.round_index).up, client_id, len(parcel.message), seconds)

    def count_down(self, parcel: Parcel, client_id: int, seconds: float) -> None:
        """Add a download."""
        _add(self.of_round(parcel.round_index).down, client_id, len(parcel.message), seconds)

    def restore_downlink(self, rounds: Mapping[Any, Mapping[Any, Sequence[Any]]]) -> None:
        """Take back what was counted down before an interruption; uploads are made again."""
        for t, clients in rounds.items():
            for client_id, (wire_bytes, seconds) in clients.items():
                _add(self.of_round(int(t)).down, int(client_id), int(wire_bytes), float(seconds))


def _add(column: dict[int, tuple[int, float]], client_id: int, wire_bytes: int, seconds: float) -> None:
    bytes_before, seconds_before = column.get(client_id, (0, 0.0))
    column[client_id] = (bytes_before + wire_bytes, seconds_before + seconds)


class ServerEnd(Protocol):
    """The server's end of a transport."""

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Hand a message over for a client; returns at once."""

    def receive(
        self, timeout_s: float, waiting_for: str, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        """Wait for the next message of any client.

        Args:
            timeout_s: Patience, seconds without any progress.
            waiting_for: What for, in words.
            from_clients: Whose messages are missed, None: anybody's; a transport that has to ask asks them.

        Raises:
            StallError: When nothing has moved for `timeout_s`.
        """

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        """Wait for the next message of any client, or give None when the clock reaches `deadline_s` first."""


class ClientEnd(Protocol):
    """A client's end of a transport; its communication thread owns it.

    `upload_s`, `download_s`, `uploaded` and `downloaded` may raise a `LinkError`: the transfer is then made
    again from its beginning, which is the last good chunk.
    """

    def attach(self, client_id: int, deliver: Callable[[Parcel], None]) -> None:
        """Say who takes what arrives for this client."""

    def upload_s(self, parcel: Parcel) -> float:
        """Tell how long a message takes up."""

    def download_s(self, parcel: Parcel) -> float:
        """Tell how long a message that has arrived at the link takes down."""

    def finish_upload(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Give the server a message whose time has passed, and count it."""

    def finish_download(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Count a message whose time has passed."""


@dataclass(frozen=True)
class Link:
    """Bandwidth and latency of one client's link.

    Attributes:
        upload_mbps: Client to server, 10^6 bit/s; None is unlimited.
        download_mbps: Server to client, 10^6 bit/s; None is unlimited.
        latency_s: One way, seconds.
    """

    upload_mbps: float | None = None
    download_mbps: float | None = None
    latency_s: float = 0.0

    def upload_s(self, wire_bytes: int) -> float:
        """Seconds that this many bytes take up."""
        return self.latency_s + _seconds(wire_bytes, self.upload_mbps)

    def download_s(self, wire_bytes: int) -> float:
        """Seconds that this many bytes take down."""
        return self.latency_s + _seconds(wire_bytes, self.download_mbps)


def _seconds(wire_bytes: int, mbps: float | None) -> float:
    return 0.0 if mbps is None else wire_bytes * 8 / (mbps * 1e6)


class MemoryTransport:
    """Both ends in one process, over shaped links.

    Args:
        clock: Whose time the links take.
        link: The link of each client.
        num_clients: How many there are.

    Attributes:
        look: What the server's end does now and then while it waits for some clients.
    """

    def __init__(self, clock: Clock, link: Link, num_clients: int) -> None:
        self._clock, self._link = clock, link
        self._inbox = clock.mailbox()
        self._deliver: dict[int, Callable[[Parcel], None]] = {}
        self._early = {client_id: deque[Parcel]() for client_id in range(num_clients)}
        self._gone: set[int] = set()
        self.look: Callable[[Collection[int] | None], None] = lambda _: None
        self.ledger = Ledger()

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Put a message before the client's link; one that has not attached yet finds it there."""
        if client_id in self._deliver:
            self._deliver[client_id](parcel)
        else:
            self._early[client_id].append(parcel)

    def receive(
        self, timeout_s: float, waiting_for: str, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        """Wait for the next message of any client; they come by themselves."""
        return _opened(self._inbox.get(timeout_s, waiting_for, partial(self.look, from_clients)))

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        """Wait for the next message of any client until then."""
        del from_clients
        item = self._inbox.get_until(deadline_s)
        return None if item is None else _opened(item)

    def fail(self, error: BaseException) -> None:
        """Let the server's `receive` raise an error that a client ended with."""
        self._inbox.put(error)

    def attach(self, client_id: int, deliver: Callable[[Parcel], None]) -> None:
        """Deliver from now on, beginning with what was sent before."""
        for parcel in self._early.pop(client_id, ()):
            deliver(parcel)
        self._deliver[client_id] = deliver
        self._gone.discard(client_id)

    def detach(self, client_id: int) -> None:
        """Deliver nothing more to a client that is gone; should it come back, it finds the newest message."""
        del self._deliver[client_id]
        self._early[client_id] = deque(maxlen=1)
        self._gone.add(client_id)

    def is_there(self, client_id: int) -> bool:
        """Tell whether a client has not gone, or is back."""
        return client_id not in self._gone

    def upload_s(self, parcel: Parcel) -> float:
        """Tell how long a message takes up."""
        return self._link.upload_s(len(parcel.message))

    def download_s(self, parcel: Parcel) -> float:
        """Tell how long a message takes down."""
        return self._link.download_s(len(parcel.message))

    def finish_upload(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Put a message into the server's inbox."""
        self.ledger.count_up(parcel, client_id, seconds)
        self._inbox.put((client_id, parcel.message))

    def finish_download(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Count a message."""
        self.ledger.count_down(parcel, client_id, seconds)


def _opened(item: Any) -> tuple[int, bytes]:
    if isinstance(item, BaseException):
        raise item
    client_id, message = item
    return client_id, message
