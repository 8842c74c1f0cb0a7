"""The pipeline of a client: its compute thread and its communication thread. Only this file makes threads.

    compute thread (the caller's)          communication thread (made here)
      receive() ◄──────────────── inbox ◄──── download what the server sent ┐ both directions
      K local steps                                                         │ of the link
      send(update) ──────────────► work ────► upload it                     ┘ at the same time

Only immutable bytes cross. An error of the communication thread surfaces in the compute thread, at its next
`send` or `receive`. Leaving the context sends the rest and ends the thread. A transfer that is cut starts again,
until nothing of it has arrived for `stall_timeout_s`. Every wait has a limit; that of a client is twice the
server's, which may first have to go on without another client.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent import futures
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from parablock.clock import Clock, Stopped
from parablock.errors import LinkError, StallError
from parablock.trace import Trace
from parablock.wire.messages import describe
from parablock.wire.transport import ClientEnd, Parcel

_CLOSE = object()


class Interceptor(Protocol):
    """Messages of a communication thread's own, and changes of the messages that it sends."""

    def opening(self) -> list[Parcel]:
        """Return the first messages to send."""

    def outgoing(self, parcel: Parcel) -> list[Parcel]:
        """Return the messages to send instead; none if the message has to wait for an incoming one."""

    def incoming(self, parcel: Parcel) -> list[Parcel] | None:
        """Return the answers to a message; None if it is for the compute thread."""


class Pipeline:
    """One client's communication thread.

    Args:
        client_id: The client.
        transport: The client's end; owned by the communication thread from `__enter__` on.
        trace: Records uploads, downloads and waits; its clock is the run's.
        stall_timeout_s: Patience with a transfer that does not move, seconds.
        interceptor: Changes messages between the threads and the link; None: they pass as they are.
    """

    def __init__(
        self,
        client_id: int,
        transport: ClientEnd,
        trace: Trace,
        *,
        stall_timeout_s: float,
        interceptor: Interceptor | None = None,
    ) -> None:
        self._client_id, self._transport, self._trace = client_id, transport, trace
        self._stall_timeout_s, self._interceptor = stall_timeout_s, interceptor
        self._clock = clock = trace.clock
        self._work, self._inbox, self._closed = clock.mailbox(), clock.mailbox(), clock.mailbox()
        self._waiting_for = f"client {client_id}'s next transfer"
        self._abandoned = False
        self._error: BaseException | None = None

    def __enter__(self) -> Pipeline:
        self._transport.attach(self._client_id, self._work.put)
        self._thread = start_thread(self._clock, self._communicate, f"client {self._client_id} communication")
        return self

    def __exit__(self, _: object, error: BaseException | None, tb: object) -> None:
        if isinstance(error, Stopped):
            return  # the clock has stopped the communication thread too
        self._abandoned = error is not None
        self._work.put(_CLOSE)
        self._closed.get(self._stall_timeout_s, f"client {self._client_id}'s last transfers")
        self._thread.join()

    def send(self, message: bytes, round_index: int) -> None:
        """Hand a message to the communication thread, or raise its error; returns at once."""
        if self._error is not None:
            raise self._error
        self._work.put((Parcel(message, round_index),))

    def receive(self) -> bytes:
        """Wait for the next message of the server, or raise the error of the communication thread."""
        waiting_for = f"the server's next message to client {self._client_id}"
        with self._trace.span(self._client_id, "compute", "waiting"):
            item = self._inbox.get(2 * self._stall_timeout_s, waiting_for)
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, bytes)
        return item

    def _communicate(self) -> None:
        up, down = _Lane("uploading"), _Lane("downloading")
        closing = False
        try:
            up.queue.extend(self._interceptor.opening() if self._interceptor else ())
            while not (closing and up.is_empty and down.is_empty):
                for lane, seconds_of in ((up, self._transport.upload_s), (down, self._transport.download_s)):
                    self._start_transfer(lane, seconds_of)
                ends = [end for lane in (up, down) if (end := lane.next_s) is not None]
                item = (
                    self._work.get_until(min(ends))
                    if ends
                    else self._work.get(2 * self._stall_timeout_s, self._waiting_for)
                )
                if item is _CLOSE:
                    closing = True
                elif isinstance(item, Parcel):
                    down.queue.append(item)
                elif item is not None:
                    for parcel in item:
                        up.queue.extend(self._interceptor.outgoing(parcel) if self._interceptor else (parcel,))
                if self._abandoned:
                    return
                self._end_transfer(up, self._transport.finish_upload)
                if (arrived := self._end_transfer(down, self._transport.finish_download)) is not None:
                    answers = self._interceptor.incoming(arrived) if self._interceptor else None
                    if answers is None:
                        self._inbox.put(arrived.message)
                    else:
                        up.queue.extend(answers)
        except Exception as error:
            self._error = error
            self._inbox.put(error)
        finally:
            self._closed.put(None)

    def _start_transfer(self, lane: _Lane, seconds_of: Callable[[Parcel], float]) -> None:
        now_s = self._clock.now()
        if lane.current is not None or not lane.queue or now_s < lane.closed_until_s:
            return
        lane.current = lane.queue.popleft()
        try:
            lane.ends_s = now_s + seconds_of(lane.current)
            lane.began_s = self._trace.begin(self._client_id, lane.activity)
        except LinkError as cut:
            self._cut(lane, cut)

    def _end_transfer(self, lane: _Lane, done: Callable[[int, Parcel, float], None]) -> Parcel | None:
        """End the lane's transfer if its time has passed; return the arrived message."""
        now_s, parcel = self._clock.now(), lane.current
        if parcel is None or lane.ends_s > now_s:
            return None
        facts = {"round_index": parcel.round_index, "payload_bytes": len(parcel.message)}
        self._trace.end(self._client_id, "communication", lane.activity, lane.began_s, **facts)
        try:
            done(self._client_id, parcel, now_s - lane.began_s)
        except LinkError as cut:
            self._cut(lane, cut)
            return None
        lane.current = lane.cut_since_s = None
        return parcel

    def _cut(self, lane: _Lane, cut: LinkError) -> None:
        """Put the transfer back and wait for the link, as long as there is patience."""
        now_s, parcel = self._clock.now(), lane.current
        assert parcel is not None
        lane.cut_since_s = now_s if lane.cut_since_s is None else lane.cut_since_s
        patient_until_s = lane.cut_since_s + self._stall_timeout_s
        if now_s >= patient_until_s:
            raise StallError(
                f"client {self._client_id} was {lane.activity} {describe(parcel.message)}, "
                f"{len(parcel.message)} bytes, and nothing of it has arrived for {self._stall_timeout_s:g} s",
                cause=f"The link is down: {cut.what}.",
                remedy="Look at the link; if such outages are usual, raise federation.stall_timeout_s.",
            )
        lane.queue.appendleft(parcel)
        lane.current, lane.closed_until_s = None, min(now_s + cut.retry_after_s, patient_until_s)


@dataclass
class _Lane:
    """One direction of the link: messages that wait, the present transfer, and the cut."""

    activity: str
    queue: deque[Parcel] = field(default_factory=deque)
    current: Parcel | None = None
    began_s: float = 0.0
    ends_s: float = 0.0
    cut_since_s: float | None = None
    closed_until_s: float = 0.0

    @property
    def next_s(self) -> float | None:
        """Time of the lane's next event; None without one."""
        if self.current is not None:
            return self.ends_s
        return self.closed_until_s if self.queue else None

    @property
    def is_empty(self) -> bool:
        return self.current is None and not self.queue


class Machines:
    """The clients' machines in one process: a thread for each body, joined on leaving.

    Args:
        clock: The clock of all threads.
        bodies: The function of each machine.
        on_error: Called with the error of a body; has to pass it to the thread inside the context.
        stall_timeout_s: Patience with machines that do not end, seconds.
    """

    def __init__(
        self,
        clock: Clock,
        bodies: Iterable[Callable[[], None]],
        on_error: Callable[[BaseException], None],
        *,
        stall_timeout_s: float,
    ) -> None:
        self._clock, self._bodies, self._on_error = clock, list(bodies), on_error
        self._stall_timeout_s = stall_timeout_s
        self._done = clock.mailbox()
        self._first_error: BaseException | None = None

    def __enter__(self) -> Machines:
        for number, body in enumerate(self._bodies):
            start_thread(self._clock, partial(self._run, body), f"client {number}")
        return self

    def __exit__(self, _: object, error: BaseException | None, tb: object) -> None:
        if error is None:
            for number in range(len(self._bodies)):
                self._done.get(self._stall_timeout_s, f"the clients to end ({number} of {len(self._bodies)} have)")
        elif isinstance(error, Exception):
            self._clock.stop()
            self._clock.leave()
        else:
            return  # the user has interrupted; the threads are daemons
        for thread in self._clock.threads:
            thread.join()
        if error is None and self._first_error is not None:
            raise self._first_error  # a client failed after the server was done

    def _run(self, body: Callable[[], None]) -> None:
        try:
            body()
        except Exception as error:
            self._first_error = self._first_error or error
            self._on_error(error)
        finally:
            self._done.put(None)


Thread = threading.Thread
"""The type that `start_thread` returns."""


def thread_pool(num_threads: int) -> futures.ThreadPoolExecutor:
    """Return a pool of threads, for a library that asks for one."""
    return futures.ThreadPoolExecutor(num_threads)


def start_thread(clock: Clock, body: Callable[[], None], name: str) -> Thread:
    """Start a thread that takes part in the clock; `Stopped` ends it quietly."""
    ticket = clock.expect()

    def run() -> None:
        try:
            with clock.taking_part(ticket):
                body()
        except Stopped:
            pass  # another thread has failed and its error is on its way to the user

    thread = threading.Thread(target=run, name=name, daemon=True)
    clock.threads.append(thread)
    thread.start()
    return thread
