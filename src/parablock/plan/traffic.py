"""What will cross the links, in bytes.

They are those of real messages, made by the wire's own encoder with vectors that have a length and no
content. What differs from a run are digits of numbers that are not known before, a few bytes a message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from parablock.plan.itinerary import Itinerary, News
from parablock.wire.messages import Chunk, Finish, Mark, Message, NewValue, RoundStart, Update, to_bytes
from parablock.wire.quantize import Encoding, Vector, bytes_per_element, payload_bytes

TYPICAL_FRACTION = 0.1234567890123456
"""Stands for any number between 0 and 1 that only a run knows; it has as many digits."""


@dataclass(frozen=True)
class Stacked:
    """What travels down where adapters are stacked and not averaged.

    Attributes:
        num_elements: Of the matrices that the product of the stack is added to; who missed one gets them whole.
        num_updates: How many adapters a stack is of.
    """

    num_elements: int
    num_updates: int


@dataclass(frozen=True)
class Shipment:
    """A vector on its way, in chunks of which the last may be smaller.

    Attributes:
        num_chunks: How many messages.
        chunk_bytes: Of each but the last.
        last_bytes: Of the last.
    """

    num_chunks: int
    chunk_bytes: int
    last_bytes: int

    @property
    def total_bytes(self) -> int:
        """All messages."""
        return (self.num_chunks - 1) * self.chunk_bytes + self.last_bytes


class Sizes:
    """Bytes of messages in one wire format.

    Args:
        num_elements: Of each block.
        dtype: Precision of the model, in which values travel exactly.
        wire_format: Of updates, and of differences where it is narrower than the model.
        chunk_bytes: About the payload of a chunk; None sends vectors whole.
        stacked: What goes down in place of the one block's new value; None: new values do.
    """

    def __init__(
        self,
        num_elements: Sequence[int],
        *,
        dtype: str,
        wire_format: str,
        chunk_bytes: int | None,
        stacked: Stacked | None = None,
    ) -> None:
        self._num_elements, self._dtype, self._format = num_elements, dtype, wire_format
        self._stacked = stacked
        self._encoding = Encoding(wire_format, chunk_bytes=chunk_bytes)
        self._is_lossy = bytes_per_element(dtype) > bytes_per_element(wire_format)
        self.update, self.new_value = cache(self._update), cache(self._new_value)
        self.round_start, self.finish = cache(self._round_start), cache(self._finish)
        self.mark = _message_bytes(Mark(99, stop=False), ())

    def _update(self, block: int) -> Shipment:
        """Measure an update of a block."""
        return self._ship(block, lambda chunk, count: _update_message(block, chunk, count), self._format)

    def _new_value(self, block: int) -> Shipment:
        """Measure a streamed new value of a block."""
        kind, name = ("difference", self._format) if self._is_lossy else ("value", self._dtype)
        return self._ship(block, lambda chunk, _count: Chunk(block, 98, kind, chunk), name)

    def _ship(self, block: int, message: Callable[[Vector, int], Message], vector_format: str) -> Shipment:
        cuts = self._encoding.cut(self._num_elements[block])
        chunks = [_hollow(cut.stop - cut.start, vector_format) for cut in (cuts[0], cuts[-1])]
        first, last = (_message_bytes(message(chunk, len(cuts)), (chunk,)) for chunk in chunks)
        return Shipment(len(cuts), first, last)

    def _round_start(self, news: News) -> int:
        """Measure the start of a round that brings these news."""
        values = self._new_values(news)
        start = RoundStart(
            round_index=99, block_index=9, num_local_steps=9, steps_before=999, committed=98, news=values
        )
        return _message_bytes(start, [value.vector for value in values])

    def _finish(self, news: News) -> int:
        """Measure the end of the run that brings these news."""
        values = self._new_values(news)
        return _message_bytes(Finish(99, values), [value.vector for value in values])

    def _new_values(self, news: News) -> tuple[NewValue, ...]:
        values = []
        for b, kind in news:
            size, told, name = self._num_elements[b], "value", self._dtype
            if self._stacked is not None and kind == "fresh":
                size, told, name = size * self._stacked.num_updates, "stack", self._format
            elif self._stacked is not None:
                size = self._stacked.num_elements
            elif kind == "streamed":
                size, told = 0, "streamed"
            elif kind == "fresh" and self._is_lossy and len(self._encoding.cut(size)) == 1:
                told, name = "difference", self._format
            values.append(NewValue(b, 98, TYPICAL_FRACTION, told, _hollow(size, name)))
        return tuple(values)


@dataclass(frozen=True)
class TotalBytes:
    """Bytes of a whole run, all clients together."""

    uplink_bytes: int
    downlink_bytes: int
    num_visits: int

    @property
    def bytes_per_client_round(self) -> int:
        """Up and down, for one client in one round."""
        return round((self.uplink_bytes + self.downlink_bytes) / self.num_visits)


def total_bytes(itinerary: Itinerary, sizes: Sizes) -> TotalBytes:
    """Add up a whole run."""
    visits: Counter[int] = Counter()
    streams: Counter[int] = Counter()
    told: Counter[News] = Counter()
    for block, news, streamed in zip(itinerary.blocks, itinerary.news, itinerary.streams, strict=True):
        visits[block] += len(news)
        streams[block] += len(streamed)
        told.update(news.values())
    marks = len(itinerary.marks) * len(itinerary.drain) * sizes.mark
    return TotalBytes(
        sum(count * sizes.update(block).total_bytes for block, count in visits.items()),
        sum(count * sizes.round_start(news) for news, count in told.items())
        + sum(count * sizes.new_value(block).total_bytes for block, count in streams.items() if count)
        + sum(map(sizes.finish, itinerary.drain.values()))
        + marks,
        visits.total(),
    )


def _update_message(block: int, delta: Vector, num_chunks: int) -> Update:
    return Update(
        round_index=99,
        block_index=block,
        client_id=9,
        num_examples=999,
        committed=98,
        train_loss=1 + TYPICAL_FRACTION,
        num_local_steps=9,
        compute_s=0.0,
        chunk_index=num_chunks - 1,
        num_chunks=num_chunks,
        delta=delta,
    )


def _hollow(num_elements: int, payload_format: str) -> Vector:
    """Make a vector that has a length and no content."""
    return Vector(payload_format, num_elements, torch.empty(0, dtype=torch.uint8))


def _message_bytes(message: Message, vectors: Sequence[Vector]) -> int:
    """Give the length of a message whose vectors are hollow as if they were not."""
    payload = sum(payload_bytes(vector.num_elements, vector.format) for vector in vectors)
    return len(to_bytes(message)) + payload
