"""The two threads of a client, and the only place where threads are made.

    compute thread (the caller's)          communication thread (made here)
      receive() ◄──────────────── inbox ◄──── download what the server sent ┐ both directions
      K local steps                                                         │ of the link
      send(update) ──────────────► work ────► upload it                     ┘ at the same time

Only immutable bytes cross. An error of the communication thread surfaces in the compute thread, at its next
`receive`. Leaving the context sends what is left and leaves no thread behind. Every wait is bounded by the
clock's patience with a world in which nothing moves.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

from parablock.clock import Clock, Stopped
from parablock.trace import Trace
from parablock.wire.transport import ClientEnd, Parcel

_CLOSE = object()


class Pipeline:
    """One client's communication thread.

    Args:
        client_id: Whose.
        transport: The client's end; owned by the communication thread from `__enter__` on.
        trace: Where uploads, downloads and waits are recorded; it also knows the clock.
        stall_timeout_s: Patience of every wait, seconds.
    """

    def __init__(self, client_id: int, transport: ClientEnd, trace: Trace, *, stall_timeout_s: float) -> None:
        self._client_id, self._transport, self._trace = client_id, transport, trace
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock = trace.clock
        self._work, self._inbox, self._closed = clock.mailbox(), clock.mailbox(), clock.mailbox()
        self._waiting_for = f"client {client_id}'s next transfer"
        self._abandoned = False

    def __enter__(self) -> Pipeline:
        self._transport.attach(self._client_id, self._work.put)
        self._thread = _start(self._clock, self._communicate, f"client {self._client_id} communication")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            return  # the clock has stopped the communication thread too
        self._abandoned = error is not None
        self._work.put(_CLOSE)
        self._closed.get(self._stall_timeout_s, f"client {self._client_id}'s last transfers")
        self._thread.join()

    def send(self, message: bytes, round_index: int) -> None:
        """Hand an update to the communication thread; returns at once. Called by the compute thread."""
        self._work.put((Parcel(message, round_index),))

    def receive(self) -> bytes:
        """Wait for the next message of the server. Called by the compute thread.

        Raises:
            ParaBlockError: Whatever the communication thread failed with.
        """
        with self._trace.span(self._client_id, "compute", "waiting"):
            item = self._inbox.get(self._stall_timeout_s, f"the server's next message to client {self._client_id}")
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, bytes)
        return item

    def _communicate(self) -> None:
        up, down = _Lane(), _Lane()
        closing = False
        try:
            while not (closing and up.is_empty and down.is_empty):
                self._start_transfers(up, down)
                ends = [lane.ends_s for lane in (up, down) if lane.current is not None]
                item = (
                    self._work.get_until(min(ends))
                    if ends
                    else self._work.get(self._stall_timeout_s, self._waiting_for)
                )
                if item is _CLOSE:
                    closing = True
                elif item is not None:
                    (down if isinstance(item, Parcel) else up).queue.append(item)
                if self._abandoned:
                    return
                self._end_transfers(up, down)
        except Exception as error:
            self._inbox.put(error)
        finally:
            self._closed.put(None)

    def _start_transfers(self, up: _Lane, down: _Lane) -> None:
        now = self._clock.now()
        if up.current is None and up.queue:
            (up.current,) = up.queue.popleft()
            up.began_s = self._trace.begin(self._client_id, "uploading")
            up.ends_s = now + self._transport.upload_s(up.current)
        if down.current is None and down.queue:
            down.current = down.queue.popleft()
            down.began_s = self._trace.begin(self._client_id, "downloading")
            down.ends_s = now + self._transport.download_s(down.current)

    def _end_transfers(self, up: _Lane, down: _Lane) -> None:
        now = self._clock.now()
        if up.current is not None and up.ends_s <= now:
            self._record("uploading", up.began_s, up.current)
            self._transport.uploaded(self._client_id, up.current, now - up.began_s)
            up.current = None
        if down.current is not None and down.ends_s <= now:
            self._record("downloading", down.began_s, down.current)
            self._transport.downloaded(self._client_id, down.current, now - down.began_s)
            self._inbox.put(down.current.message)
            down.current = None

    def _record(self, activity: str, began_s: float, parcel: Parcel) -> None:
        facts = {"round_index": parcel.round_index, "payload_bytes": len(parcel.message)}
        self._trace.end(self._client_id, "communication", activity, began_s, **facts)


@dataclass
class _Lane:
    """One direction of the link: what waits, and what is on its way until when."""

    queue: deque[Any] = field(default_factory=deque)
    current: Parcel | None = None
    began_s: float = 0.0
    ends_s: float = 0.0

    @property
    def is_empty(self) -> bool:
        return self.current is None and not self.queue


class Machines:
    """The clients' machines in one process: a thread for each body, joined on leaving.

    Args:
        clock: The clock that all take part in.
        bodies: What each machine runs.
        on_error: Told the error that a body ended with; it has to reach the thread that is inside.
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
            _start(self._clock, partial(self._run, body), f"client {number}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if error is None:
            for number in range(len(self._bodies)):
                self._done.get(self._stall_timeout_s, f"the clients to end ({number} of {len(self._bodies)} have)")
        elif isinstance(error, Exception):
            self._clock.stop()
            self._clock.leave()
        else:
            return  # the user is in a hurry; the threads are daemons
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


def _start(clock: Clock, body: Callable[[], None], name: str) -> threading.Thread:
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
