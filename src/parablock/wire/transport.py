"""Transports: the links between server and clients, and the ledger of their traffic.

A transport has two ends. The server's end has `send` (returns at once) and `receive` (waits). A client's end
belongs to the client's communication thread: the thread gets arriving messages (`attach`), asks for the time of a
transfer, lets that time pass, and then finishes the transfer. The two directions of a link do not slow each other
down.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from parablock.clock import Clock

MESSAGE_BYTES = 1 << 10
"""What a message that waits costs beside its bytes, so that many empty ones are many bytes too."""


@dataclass(frozen=True)
class Parcel:
    """A message, and the round that its bytes count for; only the message travels."""

    message: bytes
    round_index: int


@dataclass
class Traffic:
    """The traffic of one round: for each client the bytes and seconds of its uploads and its downloads.

    Other threads may add to it while it is read.
    """

    up: dict[int, tuple[int, float]] = field(default_factory=dict)
    down: dict[int, tuple[int, float]] = field(default_factory=dict)

    @property
    def uplink_bytes(self) -> int:
        """Uploaded bytes of all clients."""
        return sum(wire_bytes for wire_bytes, _ in tuple(self.up.values()))

    @property
    def downlink_bytes(self) -> int:
        """Downloaded bytes of all clients."""
        return sum(wire_bytes for wire_bytes, _ in tuple(self.down.values()))

    def seconds(self, client_id: int) -> float:
        """Return the seconds that a client's link was busy."""
        return self.up.get(client_id, (0, 0.0))[1] + self.down.get(client_id, (0, 0.0))[1]


class Ledger:
    """The traffic of every round, counted where it crosses the link."""

    def __init__(self) -> None:
        self._rounds: dict[int, Traffic] = {}

    def of_round(self, round_index: int) -> Traffic:
        """Return the traffic of one round so far."""
        return self._rounds.setdefault(round_index, Traffic())

    def count_up(self, parcel: Parcel, client_id: int, seconds: float) -> None:
        """Add an upload."""
        _add(self.of_round(parcel.round_index).up, client_id, len(parcel.message), seconds)

    def count_down(self, parcel: Parcel, client_id: int, seconds: float) -> None:
        """Add a download."""
        _add(self.of_round(parcel.round_index).down, client_id, len(parcel.message), seconds)

    def restore_downlink(self, rounds: Mapping[Any, Mapping[Any, Sequence[Any]]]) -> None:
        """Restore the downloads counted before an interruption; uploads are repeated and counted anew."""
        for t, clients in rounds.items():
            for client_id, (wire_bytes, seconds) in clients.items():
                _add(self.of_round(int(t)).down, int(client_id), int(wire_bytes), float(seconds))


def _add(column: dict[int, tuple[int, float]], client_id: int, wire_bytes: int, seconds: float) -> None:
    bytes_before, seconds_before = column.get(client_id, (0, 0.0))
    column[client_id] = (bytes_before + wire_bytes, seconds_before + seconds)


class StopAsked(BaseException):
    """The run is asked to stop while it waits for clients that are gone; users never see it."""

    def __init__(self, gone: Iterable[int]) -> None:
        self.gone = tuple(gone)
        names = ", ".join(f"client {client_id}" for client_id in self.gone)
        super().__init__(f"asked to stop, and no longer waiting for {names}: gone, or silent for long")


class ServerTransport(Protocol):
    """The server's end of a transport: everything that a server asks of it.

    A transport is made with `asked_to_stop`. While it waits for a client that is gone, it raises `StopAsked` as
    soon as that is true; a client that is there, and only takes its time, is waited for.
    """

    @property
    def ledger(self) -> Ledger:
        """Bytes and seconds of every round."""

    def is_there(self, client_id: int) -> bool:
        """Return False for a client that is known to be gone, or silent beyond its time."""

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Hand a message over for a client; returns at once."""

    def receive(
        self, timeout_s: float, waiting_for: str, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        """Wait for the next message of any client.

        Args:
            timeout_s: Patience, seconds without any progress.
            waiting_for: The awaited thing in words, for the error.
            from_clients: The clients whose messages are missing, for transports that poll; None: all clients.

        Raises:
            StallError: Nothing has moved for `timeout_s`.
            StopAsked: See above.
        """

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        """Wait for the next message of any client; None if the clock reaches `deadline_s` first.

        Raises:
            StopAsked: At real sites, where the run is asked to stop and one of `from_clients` is gone.
        """


class PutAside:
    """Messages of clients that have to wait, in order; of each client so many bytes at most, and one more."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, Counter[int]()
        self._messages = deque[tuple[int, bytes]]()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, client_id: int, message: bytes) -> bool:
        """Put a message aside; return False where too many of its client's wait."""
        has_room = self._bytes[client_id] <= self._most_bytes
        if has_room:
            self._bytes[client_id] += len(message) + MESSAGE_BYTES
            self._messages.append((client_id, message))
        return has_room

    def take(self) -> tuple[int, bytes]:
        """Return the first client and its message."""
        client_id, message = self._messages.popleft()
        self._bytes[client_id] -= len(message) + MESSAGE_BYTES
        return client_id, message


class MaskedTransport(ServerTransport, Protocol):
    """A server's end of a transport over which updates come masked; see `MaskedServer`."""

    on_refusal: Callable[[int, str, str], None]

    @property
    def members(self) -> tuple[int, ...]:
        """The clients that can take part."""

    def leave_out(self, client_id: int) -> None:
        """Let the others mask with a client no more."""

    def unfit(self, round_index: int, clients: Sequence[int]) -> dict[int, str]:
        """Return the clients whose updates cannot be in a sum of masked ones, each with what is wrong with it."""

    def fixed_set(self, round_index: int, clients: tuple[int, ...]) -> tuple[int, ...]:
        """Return the clients of whose updates a round's sum has to be."""

    def masks_of(self, round_index: int, clients: Sequence[int], size: int) -> Tensor:
        """Return the sum of the masks of these clients' updates."""


class ClientEnd(Protocol):
    """A client's end of a transport, owned by the client's communication thread.

    All methods but `attach` may raise a `LinkError`: the transfer is then repeated from its beginning, which is the
    last good chunk.
    """

    def attach(self, client_id: int, deliver: Callable[[Parcel], None]) -> None:
        """Set the receiver of the messages for this client."""

    def upload_s(self, parcel: Parcel) -> float:
        """Return the seconds of an upload."""

    def download_s(self, parcel: Parcel) -> float:
        """Return the seconds of a download that has arrived at the link."""

    def finish_upload(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Deliver a message to the server when its time has passed, and count it."""

    def finish_download(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Count a message when its time has passed."""


@dataclass(frozen=True)
class Link:
    """One client's link: bandwidth in 10^6 bit/s (None is unlimited), and one-way latency in seconds."""

    upload_mbps: float | None = None
    download_mbps: float | None = None
    latency_s: float = 0.0

    def upload_s(self, wire_bytes: int) -> float:
        """Return the seconds of an upload of this size."""
        return self.latency_s + _seconds(wire_bytes, self.upload_mbps)

    def download_s(self, wire_bytes: int) -> float:
        """Return the seconds of a download of this size."""
        return self.latency_s + _seconds(wire_bytes, self.download_mbps)


def _seconds(wire_bytes: int, mbps: float | None) -> float:
    return 0.0 if mbps is None else wire_bytes * 8 / (mbps * 1e6)


class MemoryTransport:
    """Both ends in one process, over simulated links, which are alike for all clients."""

    def __init__(
        self, clock: Clock, link: Link, num_clients: int, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._clock, self._link, self._clients, self._asked_to_stop = clock, link, range(num_clients), asked_to_stop
        self._inbox = clock.mailbox()
        self._deliver: dict[int, Callable[[Parcel], None]] = {}
        self._early = {client_id: deque[Parcel]() for client_id in range(num_clients)}
        self._gone: set[int] = set()
        self.ledger = Ledger()

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Deliver a message to a client, or keep it until the client attaches."""
        if client_id in self._deliver:
            self._deliver[client_id](parcel)
        else:
            self._early[client_id].append(parcel)

    def receive(
        self, timeout_s: float, waiting_for: str, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        """Wait for the next message of any client."""
        awaited = self._clients if from_clients is None else from_clients
        check = partial(check_for_stop, self, awaited, self._asked_to_stop)
        return _open(self._inbox.get(timeout_s, waiting_for, check))

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        """Wait for the next message of any client; None if the clock reaches `deadline_s` first."""
        del from_clients
        item = self._inbox.get_until(deadline_s)
        return None if item is None else _open(item)

    def fail(self, error: BaseException) -> None:
        """Let the server's `receive` raise the error of a failed client."""
        self._inbox.put(error)

    def attach(self, client_id: int, deliver: Callable[[Parcel], None]) -> None:
        """Deliver from now on, beginning with the messages that were kept."""
        for parcel in self._early.pop(client_id, ()):
            deliver(parcel)
        self._deliver[client_id] = deliver
        self._gone.discard(client_id)

    def detach(self, client_id: int) -> None:
        """Stop delivering to a client that is gone, and keep only the newest message for its return."""
        del self._deliver[client_id]
        self._early[client_id] = deque(maxlen=1)
        self._gone.add(client_id)

    def is_there(self, client_id: int) -> bool:
        """Return whether a client has not gone, or is back."""
        return client_id not in self._gone

    def upload_s(self, parcel: Parcel) -> float:
        """Return the seconds of an upload."""
        return self._link.upload_s(len(parcel.message))

    def download_s(self, parcel: Parcel) -> float:
        """Return the seconds of a download."""
        return self._link.download_s(len(parcel.message))

    def finish_upload(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Count a message and put it into the server's inbox."""
        self.ledger.count_up(parcel, client_id, seconds)
        self._inbox.put((client_id, parcel.message))

    def finish_download(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Count a message."""
        self.ledger.count_down(parcel, client_id, seconds)


def check_for_stop(transport: ServerTransport, awaited: Collection[int], asked_to_stop: Callable[[], bool]) -> None:
    """Stop waiting where the user asks for it and the wait may be long.

    Raises:
        StopAsked: The run is asked to stop, and one of the awaited clients is gone.
    """
    gone = [client_id for client_id in awaited if not transport.is_there(client_id)]
    if gone and asked_to_stop():
        raise StopAsked(gone)


def _open(item: Any) -> tuple[int, bytes]:
    if isinstance(item, BaseException):
        raise item
    client_id, message = item
    return client_id, message
