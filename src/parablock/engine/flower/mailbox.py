"""The trainer's communication thread: a mailbox that ClientApps come to with what the server sent.

It stands where `Pipeline` stands in one process, so that the `Client` above it is the same. Each ClientApp
brings the server's frames and takes back the client's; between two of them, and while Flower carries the
bytes, the compute thread trains. What came is on the disk before it is confirmed.
"""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import TracebackType

from parablock.engine.flower.exchange import BOTH, DOWN, Reply, Request, word_of
from parablock.engine.flower.local_socket import accept, receive_request, send
from parablock.engine.flower.session import SessionFolder
from parablock.engine.flower.stream import Frame, Inbox, Outbox, Place
from parablock.engine.pipeline import start_thread
from parablock.errors import CodecError, ParaBlockError, StallError, StorageError
from parablock.trace import Trace

SLICE_S = 0.05
"""How often a waiting thread looks at both of what it waits for."""


@dataclass(frozen=True)
class _Published:
    """What the compute thread has to send, at the moment when it asks for its next message."""

    messages: tuple[tuple[bytes, int], ...]
    consumed: int


@dataclass(frozen=True)
class _Ended:
    """The compute thread is done, or has failed."""

    error: tuple[str, str, str, int] | tuple[()]
    messages: tuple[tuple[bytes, int], ...] = ()


@dataclass(frozen=True)
class _Visit:
    """A ClientApp that waits for its reply."""

    connection: Connection
    request: Request
    arrived_s: float


@dataclass(frozen=True)
class _Given:
    """Where in the client's stream the newest reply by one way begins and ends."""

    attempt: int
    first: Place
    end: Place


class TrainerMailbox:
    """One client's communication with its server, by way of ClientApps.

    The clock of `trace` is the trainer's and must be real; it was at zero `epoch_s` seconds after 1970 began.
    The trainer lives for `lease_s` without a sign of the server.
    """

    def __init__(
        self,
        client_id: int,
        listener: socket.socket,
        secret: bytes,
        folder: SessionFolder,
        trace: Trace,
        *,
        epoch_s: float,
        lease_s: float,
    ) -> None:
        self._client_id, self._listener, self._secret, self._folder = client_id, listener, secret, folder
        self._trace, self._epoch_s, self._lease_s = trace, epoch_s, lease_s
        position = folder.position
        self._next_received, self._next_sent = position.wanted, position.first_sent
        self._batch: list[tuple[bytes, int]] = []
        self._consumed = self._delivered = 0
        self._out, self._in = Outbox(position.first_sent), Inbox(position.wanted)
        self._given: dict[str, _Given] = {}
        clock = trace.clock
        self._from_compute, self._to_compute, self._closed = clock.mailbox(), clock.mailbox(), clock.mailbox()
        self._ended: _Ended | None = None
        self._busy = True
        self._spans_told = 0

    # ── the compute thread ──────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> TrainerMailbox:
        for message, _ in self._in.take(self._folder.kept()):
            self._deliver(message)
        self._thread = start_thread(self._trace.clock, self._serve, f"client {self._client_id} communication")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._from_compute.put(_Ended(() if error is None else word_of(error), tuple(self._batch)))
        self._closed.get(self._lease_s * 2, "the server to take the last reply")
        self._thread.join()

    def send(self, message: bytes, round_index: int) -> None:
        """Have an update ready for the next ClientApp. Called by the compute thread."""
        self._batch.append((message, round_index))
        self._next_sent += 1

    def receive(self) -> bytes:
        """Wait for the next message of the server. Called by the compute thread.

        Raises:
            StallError: The server gave no sign of life for the length of the lease.
        """
        self._publish()
        with self._trace.span(self._client_id, "compute", "waiting"):
            item = self._to_compute.get(self._lease_s * 2, "the server's next message")
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, bytes)
        self._next_received += 1
        self._consumed += 1
        return item

    def wanted_before(self, messages: int) -> int:
        """Return the number of the first of the last so many received messages; of 0 messages, the next one."""
        return self._next_received - messages

    def first_sent(self, messages: int) -> int:
        """Return the number of the first of the last so many messages to send."""
        return self._next_sent - messages

    def _publish(self) -> None:
        self._from_compute.put(_Published(tuple(self._batch), self._consumed))
        self._batch.clear()

    # ── the communication thread ────────────────────────────────────────────────────────────────────

    def _serve(self) -> None:
        self._heard_s = self._trace.clock.now()
        waiting: list[_Visit] = []
        try:
            while not self._is_over():
                self._listener.settimeout(1e-3 if waiting else SLICE_S * 4)
                visit = self._receive_courier()
                if visit is not None:
                    waiting.append(visit)
                self._look_at_compute(SLICE_S if waiting and visit is None else 0.0)
                waiting = [visit for visit in waiting if not self._answer(visit)]
        except (OSError, ParaBlockError) as error:
            self._to_compute.put(error)
        finally:
            for visit in waiting:
                visit.connection.close()
            self._listener.close()
            self._closed.put(None)

    def _is_over(self) -> bool:
        if self._ended is not None and self._told_end:
            return True
        if self._trace.clock.now() - self._heard_s < self._lease_s:
            return False
        self._to_compute.put(
            StallError(
                f"client {self._client_id} heard nothing of the server for {self._lease_s:g} s",
                cause="The run was stopped, or the SuperNode is down or cannot reach the server.",
                remedy="Start the SuperNode again; the trainer goes on where it was when the server asks for it.",
            )
        )
        return True

    _told_end = False

    def _receive_courier(self) -> _Visit | None:
        """Take the next ClientApp and what it brings; one that goes away in the middle will come again."""
        try:
            connection = accept(self._listener, self._secret)
        except TimeoutError:
            return None
        if connection is None:
            return None
        try:
            try:
                request = receive_request(connection)
                if request.session != self._folder.session:
                    os.kill(os.getpid(), signal.SIGTERM)  # a new session; all that counts is on the disk
                self._heard_s = arrived = self._trace.clock.now()
                self._take(request)
                return _Visit(connection, replace(request, frames=()), arrived)  # their bytes are the trainer's now
            except (CodecError, StorageError) as error:
                send(connection, Reply(self._client_id, self._in.wanted, error=word_of(error)))
        except (EOFError, OSError):
            pass
        connection.close()
        return None

    def _answer(self, visit: _Visit) -> bool:
        """Reply if there is something to reply with; tell whether a ClientApp needs no more attention."""
        try:
            if visit.connection.poll():  # it has nothing more to say: it is gone
                visit.connection.close()
                return True
            if self._should_wait(visit.request, visit.arrived_s):
                return False
            self._heard_s = self._trace.clock.now()
            with visit.connection:
                send(visit.connection, self._reply(visit.request, visit.arrived_s))
            self._told_end = self._ended is not None
        except (EOFError, OSError):
            visit.connection.close()
        return True

    def _take(self, request: Request) -> None:
        self._out.acknowledge(request.wanted, request.ahead)
        fresh = self._in.fresh(request.frames, follows=request.follows > 0)
        for message, _ in self._in.take(request.frames, follows=request.follows > 0):
            self._deliver(message)
        self._folder.keep(fresh)  # while the compute thread goes on; the reply, which confirms them, waits for it

    def _deliver(self, message: bytes) -> None:
        self._delivered += 1
        self._busy = True
        self._to_compute.put(message)

    def _should_wait(self, request: Request, arrived: float) -> bool:
        if self._ended is not None or request.carries == DOWN or self._out.has(self._first_for(request)):
            return False
        if not self._busy and request.carries == BOTH:
            return False  # nothing comes of it before the server sends more, and this is how it does
        return self._trace.clock.now() - arrived < request.wait_s

    def _look_at_compute(self, seconds: float) -> None:
        """Take what the compute thread has published, waiting for it so long at most."""
        item = self._from_compute.get_until(self._trace.clock.now() + max(seconds, 1e-3))
        if item is not None:
            for message, round_index in item.messages:
                self._out.put(message, round_index)
        if isinstance(item, _Published):
            self._busy = item.consumed < self._delivered
        elif isinstance(item, _Ended):
            self._ended, self._busy = item, False
            if not item.error:
                self._folder.finish(self._in.wanted.message)

    def _reply(self, request: Request, arrived: float) -> Reply:
        spans = self._trace.spans[self._spans_told :]
        self._spans_told += len(spans)
        return Reply(
            client_id=self._client_id,
            wanted=self._in.wanted,
            ahead=self._in.ahead,
            arrived_s=self._epoch_s + arrived,
            left_s=self._epoch_s + self._trace.clock.now(),
            idle=not self._busy,
            finished=self._ended is not None and not self._ended.error,
            held_rounds=self._folder.held_rounds(),
            spans=tuple(
                (s.lane, s.activity, s.start_s + self._epoch_s, s.duration_s, s.facts)
                for s in spans
                if s.activity != "waiting"
            ),
            error=self._ended.error if self._ended else (),
            frames=() if request.carries == DOWN else self._next_frames(request),
        )

    def _next_frames(self, request: Request) -> tuple[Frame, ...]:
        first = self._first_for(request)
        until = request.ahead if first == request.wanted else None
        frames = self._out.after(first, request.budget_bytes, request.frame_bytes, until)
        self._given[request.carries] = _Given(request.attempt, first, frames[-1].next_place if frames else first)
        return tuple(frames)

    def _first_for(self, request: Request) -> Place:
        """Return where a reply begins: where the server is, or behind what the exchange before it has taken."""
        given = self._given.get(request.carries)
        if request.follows and given is not None:
            if given.attempt == request.follows:
                return max(request.wanted, given.end)
            if given.attempt == request.attempt:  # that ClientApp has died, and another one asks for it
                return max(request.wanted, given.first)
        return request.wanted
