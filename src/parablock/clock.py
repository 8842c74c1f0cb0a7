"""The real clock, and the virtual clock of a discrete-event simulation, behind one interface.

Under `RealClock` a sleep takes real time. Under `VirtualClock` exactly one thread runs at a time, a sleep only
advances the simulated time, and computation costs the time that it takes with the machine to itself. So a hundred
clients on two cores show the times of a hundred machines. Neither clock starts a thread; `engine/pipeline.py` does.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from parablock.errors import StallError

REAL_SLEEP_SLICE_S = 0.05
LOOK_S = 0.5
"""Seconds between two calls of `look` while a thread waits."""


class Thread(Protocol):
    """A thread that can be joined."""

    def join(self) -> None:
        """Wait until the thread ends."""


class Stopped(BaseException):
    """Raised in a waiting thread when another thread has failed; never seen by users."""


class Mailbox(Protocol):
    """A queue that one thread waits at and other threads fill."""

    def put(self, item: Any) -> None:
        """Add an item; never waits."""

    def get(self, timeout_s: float, waiting_for: str, look: Callable[[], None] | None = None) -> Any:
        """Wait for the oldest item and take it.

        Args:
            timeout_s: Patience, seconds.
            waiting_for: The awaited thing in words, for the error.
            look: Called now and then while real time passes; an exception that it raises ends the wait.

        Raises:
            StallError: Nothing at all has moved for `timeout_s`. Of several waiting threads, the least patient one
                gets the error first, and may get things moving again.
        """

    def get_until(self, deadline_s: float) -> Any:
        """Take the oldest item; None if the clock reaches `deadline_s` first."""


class Clock(Protocol):
    """The clock of a run."""

    name: str
    threads: list[Thread]
    """The threads that take part, to be joined at the end."""

    def now(self) -> float:
        """Seconds since the run began."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""

    def working(self, seconds: float | None = None) -> AbstractContextManager[None]:
        """Account for computation in the block: its real time, or `seconds` under the virtual clock."""

    def mailbox(self) -> Mailbox:
        """Make a mailbox whose waiting this clock understands."""

    def expect(self) -> object:
        """Announce a thread that will soon take part; return its ticket for `taking_part`."""

    def taking_part(self, ticket: object) -> AbstractContextManager[None]:
        """Wrap the whole body of an announced thread."""

    def progress(self) -> None:
        """Note that something moved, so that no waiting thread loses patience."""

    def stop(self) -> None:
        """Make every waiting thread raise `Stopped`."""

    def leave(self) -> None:
        """Let the other threads go on without this one, which waits only for their end."""


def _stalled(timeout_s: float, waiting_for: str) -> StallError:
    return StallError(
        f"nothing moved for {timeout_s:g} s while waiting for {waiting_for}",
        cause="The other side is gone, blocked, or much slower than expected.",
        remedy="Look at the other side; if it is only slow, raise federation.stall_timeout_s.",
    )


class RealClock:
    """Real time."""

    name = "real"

    def __init__(self, *, start_s: float = 0.0) -> None:
        self._origin = time.perf_counter() - start_s
        self._mailboxes: list[_RealMailbox] = []
        self._working: set[object] = set()
        self.moved_s = start_s
        self.stopped = False
        self.threads: list[Thread] = []

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._origin

    def sleep(self, seconds: float) -> None:
        """Sleep in slices, so that a failure elsewhere ends the sleep."""
        end = self.now() + seconds
        while (left := end - self.now()) > 0:
            if self.stopped:
                raise Stopped
            time.sleep(min(left, REAL_SLEEP_SLICE_S))
            self.progress()

    @contextmanager
    def working(self, seconds: float | None = None) -> Iterator[None]:
        """Keep waiting threads patient while the block computes; `seconds` has no effect."""
        del seconds
        work = object()
        self._working.add(work)
        try:
            yield
        finally:
            self._working.discard(work)
            self.progress()

    def mailbox(self) -> Mailbox:
        """Make a mailbox."""
        box = _RealMailbox(self)
        self._mailboxes.append(box)
        return box

    def expect(self) -> object:
        """Return None: real threads need no announcement."""
        return None

    def taking_part(self, ticket: object) -> AbstractContextManager[None]:
        """Return an empty context."""
        del ticket
        return nullcontext()

    def progress(self) -> None:
        """Restart the patience of all waiting threads."""
        self.moved_s = self.now()

    def stop(self) -> None:
        """Wake every waiting thread."""
        self.stopped = True
        for box in self._mailboxes:
            box.put(None)

    def leave(self) -> None:
        """Do nothing: real threads run by themselves."""


class _RealMailbox:
    def __init__(self, clock: RealClock) -> None:
        self._clock, self._items = clock, SimpleQueue[Any]()

    def put(self, item: Any) -> None:
        self._clock.progress()
        self._items.put(item)

    def get(self, timeout_s: float, waiting_for: str, look: Callable[[], None] | None = None) -> Any:
        self._clock.progress()
        while True:
            patience = timeout_s if self._clock._working else timeout_s - (self._clock.now() - self._clock.moved_s)
            if patience <= 0:
                raise _stalled(timeout_s, waiting_for)
            try:
                item = self._items.get(timeout=min(patience, LOOK_S) if look else patience)
            except Empty:
                if look:
                    look()
                continue
            if self._clock.stopped:
                raise Stopped
            return item

    def get_until(self, deadline_s: float) -> Any:
        while (left := deadline_s - self._clock.now()) > 0:
            self._clock.progress()
            try:
                item = self._items.get(timeout=min(left, REAL_SLEEP_SLICE_S))
            except Empty:
                continue
            if self._clock.stopped:
                raise Stopped
            return item
        return None


@dataclass(eq=False)
class _Actor:
    """A thread of the simulation, which runs when its gate opens."""

    gate: SimpleQueue[None] = field(default_factory=SimpleQueue)
    wake: int = 0
    patience_s: float = 0.0


_actor: ContextVar[_Actor] = ContextVar("_actor")


class VirtualClock:
    """Simulated time; the thread that makes the clock is its first actor.

    Only the running actor touches the clock, and it hands over by opening another actor's gate, so no lock is
    needed. The next to run is the actor with the earliest wake-up time, and among equals the first that asked.
    """

    name = "virtual"

    def __init__(self, *, start_s: float = 0.0) -> None:
        self._now = start_s
        self._agenda: list[tuple[float, int, _Actor, int]] = []
        self._asked = 0
        self._blocked: dict[_Actor, None] = {}  # in the order in which they came to wait
        self.stopped = False
        self.threads: list[Thread] = []
        _actor.set(_Actor())

    def now(self) -> float:
        """Simulated seconds since the run began."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let simulated time pass and other actors run."""
        self._wake_at(self._now + seconds, _actor.get())
        self._hand_over()

    @contextmanager
    def working(self, seconds: float | None = None) -> Iterator[None]:
        """Run the block while simulated time stands still, then advance time by its cost."""
        began = time.perf_counter()
        yield
        self.sleep(time.perf_counter() - began if seconds is None else seconds)

    def mailbox(self) -> Mailbox:
        """Make a mailbox; one actor may wait at it."""
        return _VirtualMailbox(self)

    def expect(self) -> object:
        """Put a thread that is about to start on the agenda; return its actor as the ticket."""
        actor = _Actor()
        self._wake_at(self._now, actor)
        return actor

    @contextmanager
    def taking_part(self, ticket: object) -> Iterator[None]:
        """Wait for the first turn, and hand over for good at the end."""
        assert isinstance(ticket, _Actor)
        _actor.set(ticket)
        ticket.gate.get()
        try:
            if self.stopped:
                raise Stopped
            yield
        finally:
            self._open_next()

    def progress(self) -> None:
        """Do nothing: the agenda alone decides who moves."""

    def stop(self) -> None:
        """Wake every blocked actor."""
        self.stopped = True
        for actor in tuple(self._blocked):
            self._wake_at(self._now, actor)

    def leave(self) -> None:
        """Hand over for good."""
        self._open_next()

    def _wake_at(self, when: float, actor: _Actor) -> None:
        self._asked += 1
        heapq.heappush(self._agenda, (when, self._asked, actor, actor.wake))

    def _hand_over(self) -> None:
        actor = _actor.get()
        self._blocked[actor] = None
        self._open_next()
        actor.gate.get()
        del self._blocked[actor]
        if self.stopped:
            raise Stopped

    def _open_next(self) -> None:
        while self._agenda:
            when, _, actor, wake = heapq.heappop(self._agenda)
            if wake == actor.wake:  # otherwise an earlier entry has woken the actor already
                self._now = max(self._now, when)
                actor.wake += 1
                actor.gate.put(None)
                return
        if self._blocked:  # nothing can move any more: advance to the time when the first actor loses patience
            actor = min(self._blocked, key=lambda blocked: blocked.patience_s)
            self._wake_at(self._now + actor.patience_s, actor)
            self._open_next()


class _VirtualMailbox:
    def __init__(self, clock: VirtualClock) -> None:
        self._clock, self._items = clock, deque[Any]()
        self._waiting: _Actor | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiting is not None:
            self._clock._wake_at(self._clock.now(), self._waiting)

    def get(self, timeout_s: float, waiting_for: str, look: Callable[[], None] | None = None) -> Any:
        del look  # no real time passes while an actor waits
        if not self._items:
            self._waiting = _actor.get()
            self._waiting.patience_s = timeout_s
            self._clock._hand_over()
            self._waiting = None
        if not self._items:
            raise _stalled(timeout_s, waiting_for)
        return self._items.popleft()

    def get_until(self, deadline_s: float) -> Any:
        if not self._items:
            self._waiting = _actor.get()
            self._clock._wake_at(max(deadline_s, self._clock.now()), self._waiting)
            self._clock._hand_over()
            self._waiting = None
        return self._items.popleft() if self._items else None
