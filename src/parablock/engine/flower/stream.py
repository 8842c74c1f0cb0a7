"""Two ordered streams of messages over exchanges that may be lost, repeated or cut short.

    sender: Outbox ── frames from a place on ──► receiver: Inbox
                   ◄──── the place it wants ────

A place is a byte of a message. The receiver says which one it wants next, and the sender cuts frames from there
on, as long as the link is worth, and keeps a message until that place has passed it. So a lost exchange costs the
frames that it carried, a repeated one costs nothing, and no message is taken twice. A sender that has died may make
a message again with other bytes, for a time that was measured stands in it. Then the receiver drops the part that
it has and takes the message from its beginning.

An exchange may follow one that is still under way, and then carries what that leaves. Where the first is lost,
what came with the second is kept ahead of its turn, and only what lies before it is sent again.

Nothing here imports torch.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

from pydantic import Field, StrictInt

from parablock.errors import CodecError

PART_BYTES = 8 << 20
"""Bytes of a frame at most. Each is a request of its own through Flower."""


def together_bytes(frame_bytes: int) -> int:
    """Return how many bytes of frames of about this length travel as one: a quarter more than one of them."""
    return frame_bytes * 5 // 4


Count = Annotated[StrictInt, Field(ge=0)]


class Place(NamedTuple):
    """A byte of a stream.

    Attributes:
        message: The number of its message, from 0.
        offset: The byte of the message; what comes before it is there.
        checksum: Adler-32 of the message, where some of it is there already; else 0.
    """

    message: Count
    offset: Count
    checksum: Count


START = Place(0, 0, 0)


@dataclass(frozen=True)
class Frame:
    """A part of a message.

    Attributes:
        message: The number of the message.
        offset: The first of its bytes.
        size: Bytes of the whole message.
        checksum: Adler-32 of the whole message.
        round_index: The round that its bytes are counted for.
        content: The bytes.
    """

    message: int
    offset: int
    size: int
    checksum: int
    round_index: int
    content: bytes

    @property
    def place(self) -> Place:
        """The place of its first byte."""
        return Place(self.message, self.offset, self.checksum if self.offset else 0)

    @property
    def next_place(self) -> Place:
        """The place behind it."""
        end = self.offset + len(self.content)
        return Place(self.message + 1, 0, 0) if end == self.size else Place(self.message, end, self.checksum)


@dataclass(frozen=True)
class _Kept:
    message: bytes
    checksum: int
    round_index: int


class Outbox:
    """The sending end of a stream, from message `first` on."""

    def __init__(self, first: int = 0) -> None:
        self.next_number, self.wanted = first, Place(first, 0, 0)
        self._ahead: Place | None = None
        self._kept: deque[_Kept] = deque()

    def put(self, message: bytes, round_index: int) -> None:
        """Append a message."""
        if self.next_number >= self.wanted.message:
            self._kept.append(_Kept(message, zlib.adler32(message), round_index))
        self.next_number += 1

    def has(self, place: Place) -> bool:
        """Return whether there is anything at this place."""
        return place.message < self.next_number

    def bytes_after(self, place: Place) -> int:
        """Return how much there is from a place on, or from what has been forgotten since."""
        first = self.next_number - len(self._kept)
        kept = sum(len(each.message) for number, each in enumerate(self._kept, first) if number >= place.message)
        return kept - (place.offset if first <= place.message < self.next_number else 0)

    def after(
        self, place: Place, budget_bytes: int, frame_bytes: int = PART_BYTES, until: Place | None = None
    ) -> list[Frame]:
        """Return frames from a place on: at least one where there is any, and no more than the budget.

        A frame has at most `frame_bytes`. The other side has what comes from `until` on.
        """
        chosen: list[Frame] = []
        frames = self._cut(place, max(1, min(frame_bytes, PART_BYTES)))
        for frame in frames if until is None or not self._is_of_this(until) else _until(until, frames):
            if chosen and len(frame.content) > budget_bytes:
                break
            budget_bytes -= len(frame.content)
            chosen.append(frame)
        return chosen

    def unconfirmed(self, budget_bytes: int, frame_bytes: int = PART_BYTES) -> list[Frame]:
        """Return frames likewise, from the newest place on that the other side has confirmed."""
        return self.after(self.wanted, budget_bytes, frame_bytes, self._ahead)

    def between(self, first: Place, until: Place) -> list[Frame]:
        """Return the part between two places, a frame of any length for each message."""
        return list(_until(until, self._cut(first, None)))

    def acknowledge(self, place: Place, ahead: Place | None = None) -> None:
        """Forget the messages before this place, which the other side has; those still to be made will not be kept.

        The other side wants `place` next; `ahead` is where the part begins that it has ahead of that. An older word
        than the newest changes nothing: exchanges may overtake each other.
        """
        if place >= self.wanted:
            self.wanted, self._ahead = place, ahead
        while self._kept and self.next_number - len(self._kept) < self.wanted.message:
            self._kept.popleft()

    @property
    def is_empty(self) -> bool:
        """Whether the other side has everything."""
        return not self._kept

    def _is_of_this(self, place: Place) -> bool:
        """Return whether a place is in what is kept, and not in a message that has been made again since."""
        first = self.next_number - len(self._kept)
        if not place.offset or not first <= place.message < self.next_number:
            return True
        return self._kept[place.message - first].checksum == place.checksum

    def _cut(self, place: Place, frame_bytes: int | None) -> Iterator[Frame]:
        """Cut what is kept from a place on into frames of about the same length; None: one for each message."""
        for number, kept in enumerate(self._kept, self.next_number - len(self._kept)):
            if number < place.message:
                continue
            size, is_begun = len(kept.message), (number, kept.checksum) == (place.message, place.checksum)
            first = place.offset if is_begun else 0
            count = 1 if frame_bytes is None else max(1, -(-(size - first) // frame_bytes))
            step = -(-(size - first) // count)
            for part in range(count):
                begin = first + part * step
                content = kept.message[begin : begin + step]  # of a whole message, no copy
                yield Frame(number, begin, size, kept.checksum, kept.round_index, content)


def _until(place: Place, frames: Iterable[Frame]) -> Iterator[Frame]:
    """Yield the part before a place."""
    for frame in frames:
        if frame.message < place.message:
            yield frame
        elif frame.message == place.message and frame.offset < place.offset:
            yield replace(frame, content=frame.content[: place.offset - frame.offset])


class Inbox:
    """The receiving end of a stream, from message `first` on."""

    def __init__(self, first: int = 0) -> None:
        self.wanted = Place(first, 0, 0)
        self._parts: list[bytes] = []
        self._ahead: list[Frame] = []

    @property
    def ahead(self) -> Place | None:
        """Where what came ahead of its turn begins; None: nothing did."""
        return self._ahead[0].place if self._ahead else None

    def fresh(self, frames: Sequence[Frame], *, follows: bool = False) -> list[Frame]:
        """Return an exchange's frames that are not there yet, and what was there ahead of them, in order.

        `follows` says that another exchange, which may have been lost, was still under way when it began.

        Raises:
            CodecError: Something is missing in between.
        """
        found, rest = _following(self.wanted, frames)
        wanted = found[-1].next_place if found else self.wanted
        if rest and not follows:
            raise CodecError(
                f"byte {rest[0].offset} of message {rest[0].message} came where byte {wanted.offset} of message "
                f"{wanted.message} was wanted",
                cause="The other side has forgotten what was never received.",
            )
        return found + _following(wanted, self._ahead)[0]

    def take(self, frames: Sequence[Frame], *, follows: bool = False) -> list[tuple[bytes, Frame]]:
        """Take frames, skipping what is known; return each message that became whole, and its last frame.

        What comes ahead of its turn is kept for it; see `fresh`.
        """
        whole: list[tuple[bytes, Frame]] = []
        fresh, rest = self.fresh(frames, follows=follows), _following(self.wanted, frames)[1]
        for frame in fresh:
            if frame.offset == 0:
                self._parts = []
            self._parts.append(frame.content)
            self.wanted = frame.next_place
            if self.wanted.message > frame.message:
                whole.append((self._parts[0] if len(self._parts) == 1 else b"".join(self._parts), frame))
                self._parts = []
        self._ahead = [frame for frame in rest or self._ahead if frame.place[:2] > self.wanted[:2]]
        return whole


def _following(wanted: Place, frames: Sequence[Frame]) -> tuple[list[Frame], Sequence[Frame]]:
    """Return the part of frames that follows a place, and the frames from the first one behind a gap on."""
    found: list[Frame] = []
    for number, frame in enumerate(frames):
        if frame.message < wanted.message:
            continue
        is_same = (frame.message, frame.checksum) == (wanted.message, wanted.checksum)
        if frame.message == wanted.message and wanted.offset and frame.offset and not is_same:
            break  # the rest of what a sender had begun that has died since: it was overtaken by the next one's
        known = wanted.offset if is_same else 0
        skipped = known - frame.offset
        if frame.message > wanted.message or skipped < 0:
            return found, frames[number:]
        if known and skipped >= len(frame.content):
            continue
        rest = replace(frame, offset=known, content=frame.content[skipped:]) if skipped else frame
        found.append(rest)
        wanted = rest.next_place
    return found, ()
