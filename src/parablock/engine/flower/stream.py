"""Two ordered streams of messages over exchanges that may be lost, repeated or cut short.

    sender: Outbox ── frames n, n+1, … ──► receiver: Inbox
                   ◄──────── next wanted ──

A message is cut into frames, each with a number; the receiver says which number it wants next, and the
sender keeps a frame until that number has passed it. So a lost exchange costs the frames that it carried, a
repeated one costs nothing, and no message is taken twice. Nothing here imports torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from parablock.errors import CodecError

PART_BYTES = 8 << 20
"""Bytes of a frame at most. Each is a request of its own through Flower."""


@dataclass(frozen=True)
class Frame:
    """A part of a message.

    Attributes:
        number: Its place in the stream, from 0.
        round_index: The round that its bytes are counted for.
        ends: Whether it is the last part of its message.
        content: The bytes.
    """

    number: int
    round_index: int
    ends: bool
    content: bytes


def frames_of(message: bytes) -> int:
    """Tell how many frames a message is cut into."""
    return max(1, -(-len(message) // PART_BYTES))


class Outbox:
    """The sending end of a stream.

    Args:
        first: The number of the next frame.
    """

    def __init__(self, first: int = 0) -> None:
        self.next_number = self._wanted = first
        self._frames: deque[Frame] = deque()

    def put(self, message: bytes, round_index: int) -> None:
        """Append a message; one that fits into a frame is not copied."""
        count = frames_of(message)
        for part in range(count):
            content = message if count == 1 else message[part * PART_BYTES : (part + 1) * PART_BYTES]
            if self.next_number >= self._wanted:
                self._frames.append(Frame(self.next_number, round_index, part == count - 1, content))
            self.next_number += 1

    def after(self, wanted: int, budget_bytes: int) -> list[Frame]:
        """Give the frames from `wanted` on: at least one where there is any, and no more than the budget."""
        chosen: list[Frame] = []
        for frame in self._frames:
            if frame.number < wanted:
                continue
            if chosen and len(frame.content) > budget_bytes:
                break
            budget_bytes -= len(frame.content)
            chosen.append(frame)
        return chosen

    def acknowledge(self, wanted: int) -> None:
        """Forget the frames before `wanted`, which the other side has; those still to be made will not be kept.

        An older word than the newest changes nothing: exchanges may overtake each other.
        """
        self._wanted = max(self._wanted, wanted)
        while self._frames and self._frames[0].number < self._wanted:
            self._frames.popleft()

    @property
    def is_empty(self) -> bool:
        """Whether the other side has everything."""
        return not self._frames


class Inbox:
    """The receiving end of a stream.

    Args:
        first: The number of the first frame that is wanted.
    """

    def __init__(self, first: int = 0) -> None:
        self.wanted = first
        self._parts: list[bytes] = []

    def take(self, frames: Iterable[Frame]) -> list[tuple[bytes, Frame]]:
        """Take frames, skipping those that are known; give each message that became whole, and its last frame.

        Raises:
            CodecError: One is missing in between.
        """
        whole: list[tuple[bytes, Frame]] = []
        for frame in frames:
            if frame.number < self.wanted:
                continue
            if frame.number > self.wanted:
                raise CodecError(
                    f"frame {frame.number} came where frame {self.wanted} was wanted",
                    cause="The other side has forgotten what was never received.",
                )
            self.wanted += 1
            self._parts.append(frame.content)
            if frame.ends:
                whole.append((self._parts[0] if len(self._parts) == 1 else b"".join(self._parts), frame))
                self._parts = []
        return whole
