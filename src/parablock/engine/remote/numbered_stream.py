"""Two ordered streams of messages, one each way, which outlive the connections that carry them.

A message is cut into parts, which are numbered from 0 in each direction. The receiver confirms every part; the
sender keeps a message until all of it is confirmed. After a cut both sides go on from the parts that are wanted
next, so that what was on its way is all that is sent twice; a `_Window` bounds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from threading import Condition

from parablock.engine.remote.frames import BYE, CONFIRM, HEAD, MAX_NOTE_BYTES, NOTE, PART, PART_BYTES
from parablock.errors import CodecError

LOOK_S = 5.0
"""How often a waiting thread looks whether its connection is still the present one."""
LEAST_AHEAD_BYTES = PART_BYTES + (64 << 10)
"""How much may be on its way, whatever the link, when a part leaves: one part, and some that are short."""
AHEAD_S = 3.0
"""How long a link may take from a part to its confirmation without the sender having to wait for it."""
PACE_S = 10.0
"""How long the pace of a link is remembered."""
STRETCH_S = 0.2
"""How long a stretch is by which the pace of a link is known."""
MOST_AHEAD_BYTES = 64 << 20
"""How much may be on its way, whatever the pace, when a part leaves."""


@dataclass
class _Message:
    """A message on its way out, or a part of one on its way in."""

    kind: int
    content: bytes
    round_index: int
    size: int
    first: int
    began_s: float = 0.0

    @property
    def num_parts(self) -> int:
        return max(1, -(-self.size // PART_BYTES))


@dataclass(frozen=True)
class Delivered:
    """A message that has crossed the link.

    Attributes:
        content: The message.
        round_index: The round that its bytes count for.
        is_note: Whether it is for the record.
        sent_s: When its first part left, seconds since 1970 by the server's clock.
        arrived_s: When its last part was there, or, at the sender, was confirmed.
    """

    content: bytes
    round_index: int
    is_note: bool
    sent_s: float
    arrived_s: float


class _Pace:
    """How fast a link carries parts, as its receiver sees it: in the best stretch of late, of `STRETCH_S` at least.

    What lay ready while the receiver was busy comes at once, and says little: a shorter stretch counts as one of
    that length. The sender cannot tell: confirmations may wait for seconds behind what goes the other way.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._bytes = 0
        self._came = deque[
            tuple[float, int]
        ]()  # when, and bytes until then: a part, and all in the stretch after it
        self._seen = deque[tuple[float, float]]()  # when, and bytes a second: each faster than all later ones

    def note(self, num_bytes: int) -> None:
        """Note that a part has come."""
        now_s = self._now_s()
        if self._came and now_s < self._came[-1][0]:  # clocks may be set back
            self._came.clear()
        self._bytes += num_bytes
        self._came.append((now_s, self._bytes))
        while len(self._came) > 1 and now_s - self._came[1][0] >= STRETCH_S:
            self._came.popleft()
        pace = max(
            (self._bytes - before) / max(STRETCH_S, now_s - then_s) for then_s, before in islice(self._came, 2)
        )
        while self._seen and self._seen[-1][1] <= pace:
            self._seen.pop()
        self._seen.append((now_s, pace))

    def bytes_per_s(self) -> int:
        """Return the pace; 0: unknown."""
        now_s = self._now_s()
        while self._seen and not 0 <= now_s - self._seen[0][0] <= PACE_S:  # clocks may be set back
            self._seen.popleft()
        return int(self._seen[0][1]) if self._seen else 0


class _Window:
    """What is on its way over a connection, and whether one more part may leave.

    A part leaves while no more is on its way than the link carries in `AHEAD_S` seconds, but `LEAST_AHEAD_BYTES` at
    least and `MOST_AHEAD_BYTES` at most. So a link whose round trip is shorter is not held up, up to 170 Mbit/s at
    any such round trip, and a cut loses no more than that and one part. The buffers of gRPC and of TCP alone hold
    several MiB before a slow link.
    """

    def __init__(self) -> None:
        self._ahead = deque[tuple[int, int]]()  # number and bytes of each part
        self._ahead_bytes, self._bytes_per_s = 0, 0

    def send(self, number: int, num_bytes: int) -> None:
        self._ahead.append((number, num_bytes))
        self._ahead_bytes += num_bytes

    def confirm(self, number: int, bytes_per_s: int) -> None:
        """Note which part the other side wants next, and the pace at which parts come to it."""
        self._bytes_per_s = bytes_per_s
        while self._ahead and self._ahead[0][0] < number:
            self._ahead_bytes -= self._ahead.popleft()[1]

    @property
    def is_open(self) -> bool:
        return self._ahead_bytes <= min(MOST_AHEAD_BYTES, max(LEAST_AHEAD_BYTES, AHEAD_S * self._bytes_per_s))


class NumberedStream:
    """One side of the two streams.

    Args:
        now_s: The server's clock, as far as this side knows it: seconds since 1970.
        max_message_bytes: Longest message that this side accepts.
        on_confirmed: Called with each message that the other side has; in the thread that reads.
    """

    def __init__(
        self,
        now_s: Callable[[], float],
        max_message_bytes: int,
        on_confirmed: Callable[[Delivered], None] = lambda _: None,
    ) -> None:
        self._now_s, self._max_message_bytes, self._on_confirmed = now_s, max_message_bytes, on_confirmed
        self._changed, self._is_taking = Condition(), False
        self._out = deque[_Message]()
        self._next_out, self._cursor, self._furthest = 0, 0, 0
        self._sending = 0  # the place in `_out` of the message at the cursor
        self._wanted, self._confirmed = 0, 0
        self._other_has, self._moves = 0, 0
        self._window, self._pace = _Window(), _Pace(now_s)
        self._coming: _Message | None = None
        self._come = list[bytes]()
        self._connection, self._has_connection = 0, False
        self._says_bye, self._bye_said = False, False
        self._holds = False
        self.is_closed = False
        self.sent_again_bytes = 0

    # ── the application's side ──────────────────────────────────────────────────────────────────────

    def put(self, message: bytes, round_index: int, *, is_note: bool = False) -> None:
        """Append a message; returns at once."""
        with self._changed:
            kind = NOTE if is_note else PART
            entry = _Message(kind, message, round_index, len(message), self._next_out)
            self._out.append(entry)
            self._next_out += entry.num_parts
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the other side has every message; return whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._out or self.is_closed, timeout_s)

    def say_bye(self, timeout_s: float) -> bool:
        """Say that nothing more will come, where there is a connection; return whether it has been said."""
        with self._changed:
            self._says_bye = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._bye_said or not self._has_connection, timeout_s)
            return self._bye_said

    def close(self) -> None:
        """End the present connection; there will be no other."""
        with self._changed:
            self.is_closed = True
            self._connection += 1
            self._has_connection = False
            self._out.clear()  # who still waits for a message of this stream keeps nothing else of it
            self._coming, self._come = None, []
            self._changed.notify_all()

    def hold(self, holds: bool) -> None:
        """Confirm nothing more, so that the other side soon has to wait, or go on confirming; sending goes on."""
        with self._changed:
            if self._holds != holds:
                self._holds = holds
                self._changed.notify_all()

    @property
    def has_connection(self) -> bool:
        """Whether a connection carries the streams at present."""
        return self._has_connection

    @property
    def waiting_bytes(self) -> int:
        """Bytes of messages that the other side has not confirmed."""
        with self._changed:
            return sum(message.size for message in self._out)

    # ── the connection's side ───────────────────────────────────────────────────────────────────────

    @property
    def wanted(self) -> int:
        """The part that this side wants next."""
        return self._wanted

    def attach(self, other_wants: int) -> int:
        """Begin a connection, in the place of the present one; return its number.

        Raises:
            CodecError: The other side wants what was never sent, or what it has confirmed already.
        """
        with self._changed:
            if self.is_closed:
                raise CodecError("the stream is closed")
            first = self._out[0].first if self._out else self._next_out
            if not first <= other_wants <= self._next_out:
                raise CodecError(
                    f"part {other_wants} is wanted; the parts {first} to {self._next_out} are kept",
                    cause="The two sides do not remember the same session.",
                )
            done = self._confirm(other_wants)
            self._cursor, self._sending = other_wants, 0
            self._window, self._pace = _Window(), _Pace(self._now_s)
            self._confirmed = self._wanted
            self._connection = connection = self._connection + 1
            self._has_connection, self._bye_said = True, False
            self._changed.notify_all()
        for message in done:
            self._on_confirmed(message)
        return connection

    def detach(self, connection: int) -> bool:
        """End a connection, and return whether it still was the present one."""
        with self._changed:
            was_present = self._connection == connection
            if was_present:
                self._connection += 1
                self._has_connection = False
                self._changed.notify_all()
            return was_present

    def is_present(self, connection: int) -> bool:
        """Return whether no later connection has taken the place of this one."""
        return self._connection == connection

    def frames(self, connection: int) -> Iterator[bytes]:
        """Yield the frames that go out over a connection, until it ends."""
        while (frame := self._next_frame(connection)) is not None:
            yield frame

    def take(
        self,
        frame: bytes,
        connection: int,
        deliver: Callable[[Delivered], None],
        begins: Callable[[bytes, int], None] = lambda *_: None,
    ) -> bool:
        """Take a frame that came over a connection, or nothing, if it is not the present one any more.

        Return whether it moves messages on: a record does not, nor does what has been confirmed before.
        `deliver` gets the message that the frame completes. It may wait: the frames of a later connection wait too,
        so that messages stay in order. `begins` gets the first part of a message and its round, before it is taken.

        Raises:
            CodecError: It is no frame, is not the next one, or does not fit the message that it is a part of.
            EOFError: The other side says bye.
        """
        with self._changed:  # who is not present any more does not wait: others need its thread
            self._changed.wait_for(lambda: not self._is_taking or not self.is_present(connection))
            if not self.is_present(connection):
                return False
            self._is_taking = True
        try:
            before = self._moves
            if (whole := self._take(frame, connection, begins)) is not None:
                deliver(whole)
            return self._moves > before
        finally:
            with self._changed:
                self._is_taking = False
                self._changed.notify_all()

    def _take(self, frame: bytes, connection: int, begins: Callable[[bytes, int], None]) -> Delivered | None:
        if len(frame) < HEAD.size or len(frame) > HEAD.size + PART_BYTES:
            raise CodecError(f"a frame of {len(frame)} bytes")
        kind, number, round_index, size, sent_s = HEAD.unpack_from(frame)
        if kind == CONFIRM:
            with self._changed:
                if self._connection != connection:
                    return None
                if number > self._cursor:
                    raise CodecError(f"part {number} is confirmed; {self._cursor} have been sent")
                if number > self._other_has:
                    self._other_has, self._moves = number, self._moves + 1
                self._window.confirm(number, size)
                done = self._confirm(number)
            for message in done:
                self._on_confirmed(message)
            return None
        if kind == BYE:
            raise EOFError
        if kind not in (PART, NOTE):
            raise CodecError(f"a frame of kind {kind}")
        return self._take_part(_Message(kind, frame[HEAD.size :], round_index, size, number, sent_s), begins)

    def _take_part(self, part: _Message, begins: Callable[[bytes, int], None]) -> Delivered | None:
        if part.first < self._wanted:
            return None  # it came over an earlier connection too
        if part.first > self._wanted:
            raise CodecError(f"part {part.first} came where {self._wanted} was wanted")
        limit = self._max_message_bytes if part.kind == PART else MAX_NOTE_BYTES
        if part.size > limit:
            raise CodecError(f"a message of {part.size} bytes; the limit is {limit}")
        coming = self._coming or part
        expected = min(PART_BYTES, coming.size - PART_BYTES * len(self._come))
        if (part.kind, part.size, part.round_index) != (coming.kind, coming.size, coming.round_index) or (
            len(part.content) != expected
        ):
            raise CodecError(
                f"part {part.first} has {len(part.content)} bytes of a message of {part.size}, "
                f"not {expected} of one of {coming.size}"
            )
        if part.kind == PART and self._coming is None:
            begins(part.content, part.round_index)
        self._come.append(part.content)
        self._coming = coming
        whole = None
        if PART_BYTES * len(self._come) >= coming.size:
            content = self._come[0] if len(self._come) == 1 else b"".join(self._come)
            is_note = coming.kind == NOTE
            whole = Delivered(content, coming.round_index, is_note, coming.began_s, self._now_s())
            self._coming, self._come = None, []
        with self._changed:
            self._wanted += 1
            self._pace.note(len(part.content))
            self._moves += part.kind == PART
            self._changed.notify_all()
        return whole

    def _confirm(self, number: int) -> list[Delivered]:
        done, now_s = [], self._now_s()
        while self._out and self._out[0].first + self._out[0].num_parts <= number:
            gone = self._out.popleft()
            self._sending = max(0, self._sending - 1)
            done.append(Delivered(gone.content, gone.round_index, gone.kind == NOTE, gone.began_s, now_s))
        self._changed.notify_all()
        return done

    def _next_frame(self, connection: int) -> bytes | None:
        with self._changed:
            while True:
                if self._connection != connection:
                    return None
                if self._confirmed < self._wanted and not self._holds:
                    self._confirmed = self._wanted
                    return HEAD.pack(CONFIRM, self._confirmed, 0, self._pace.bytes_per_s(), 0.0)
                if self._cursor < self._next_out and self._window.is_open:
                    return self._cut_next()
                if self._says_bye and not self._out and not self._bye_said:
                    self._bye_said = True
                    self._changed.notify_all()
                    return HEAD.pack(BYE, 0, 0, 0, 0.0)
                self._changed.wait(LOOK_S)

    def _cut_next(self) -> bytes:
        message = self._out[self._sending]
        while message.first + message.num_parts <= self._cursor:
            self._sending += 1
            message = self._out[self._sending]
        begin = (self._cursor - message.first) * PART_BYTES
        content = memoryview(message.content)[begin : begin + PART_BYTES]
        if self._cursor == message.first:
            message.began_s = self._now_s()
        if self._cursor < self._furthest:
            self.sent_again_bytes += len(content)
        head = HEAD.pack(message.kind, self._cursor, message.round_index, message.size, message.began_s)
        self._window.send(self._cursor, len(head) + len(content))
        self._cursor += 1
        self._furthest = max(self._furthest, self._cursor)
        return b"".join((head, content))
