"""Bytes of all messages of a run.

The wire's own encoder makes each message, with vectors that have a length and no content. A run differs in the
digits of measured numbers, by a few bytes a message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from parablock.plan.itinerary import Itinerary, News
from parablock.plan.masking_bytes import MaskingBytes
from parablock.wire.messages import Chunk, Finish, Mark, Message, NewValue, RoundStart, Update, to_bytes
from parablock.wire.quantize import Encoding, Vector, bytes_per_element, downlink_format, payload_bytes

TYPICAL_FRACTION = 0.1234567890123456
"""A stand-in for a measured number between 0 and 1, with as many digits."""


@dataclass(frozen=True)
class Stacked:
    """A stack of `num_updates` adapters, which goes down in place of an average, and is added to matrices.

    A client that missed a stack gets the `num_elements` elements of those matrices.
    """

    num_elements: int
    num_updates: int


@dataclass(frozen=True)
class Shipment:
    """A vector in chunks, one message each; all messages but the last have `chunk_bytes`."""

    num_chunks: int
    chunk_bytes: int
    last_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum over all messages."""
        return (self.num_chunks - 1) * self.chunk_bytes + self.last_bytes


class Sizes:
    """Bytes of messages in one wire format.

    Args:
        num_elements: Elements of each block.
        dtype: Precision of the model, in which values travel exactly.
        wire_format: Format of updates, and of differences if it is narrower than `dtype`.
        chunk_bytes: Approximate payload of a chunk; None to send vectors whole.
        stacked: Sizes of a stack that goes down in place of the new value; None for methods without stacks.
        masking: Bytes of the messages of secure aggregation; None without masks.
    """

    def __init__(
        self,
        num_elements: Sequence[int],
        *,
        dtype: str,
        wire_format: str,
        chunk_bytes: int | None,
        stacked: Stacked | None = None,
        masking: MaskingBytes | None = None,
    ) -> None:
        self._num_elements, self._dtype, self._format = num_elements, dtype, wire_format
        self._down = downlink_format(wire_format)
        self._stacked, self.masking = stacked, masking
        self._encoding = Encoding(wire_format, chunk_bytes=chunk_bytes)
        self._is_lossy = bytes_per_element(dtype) > bytes_per_element(wire_format)
        self.update, self.new_value = cache(self._update), cache(self._new_value)
        self.round_start, self.finish = cache(self._round_start), cache(self._finish)
        self.mark = _message_bytes(Mark(99, stop=False), ())

    def _update(self, block: int) -> Shipment:
        """Return the size of an update of a block."""
        return self._ship(block, lambda chunk, count: _update_message(block, chunk, count), self._format)

    def _new_value(self, block: int) -> Shipment:
        """Return the size of a streamed new value of a block."""
        kind, name = ("difference", self._down) if self._is_lossy else ("value", self._dtype)
        return self._ship(block, lambda chunk, _count: Chunk(block, 98, kind, chunk), name)

    def _ship(self, block: int, message: Callable[[Vector, int], Message], vector_format: str) -> Shipment:
        cuts = self._encoding.cut(self._num_elements[block])
        chunks = [_hollow(cut.stop - cut.start, vector_format) for cut in (cuts[0], cuts[-1])]
        first, last = (_message_bytes(message(chunk, len(cuts)), (chunk,)) for chunk in chunks)
        return Shipment(len(cuts), first, last)

    def _round_start(self, news: News) -> int:
        """Return the bytes of a `RoundStart` with these news."""
        values = self._new_values(news)
        numbers = {"round_index": 99, "block_index": 9, "num_local_steps": 9, "steps_before": 999, "committed": 98}
        return _message_bytes(RoundStart(**numbers, news=values), [value.vector for value in values])

    def _finish(self, news: News) -> int:
        """Return the bytes of a `Finish` with these news."""
        values = self._new_values(news)
        return _message_bytes(Finish(99, values), [value.vector for value in values])

    def num_elements(self, news: News) -> int:
        """Return the elements that come with these news."""
        return sum(value.vector.num_elements for value in self._new_values(news))

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
                told, name = "difference", self._down
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
        """Up and down of one client in one round."""
        return round((self.uplink_bytes + self.downlink_bytes) / self.num_visits)


def total_bytes(itinerary: Itinerary, sizes: Sizes) -> TotalBytes:
    """Add up the bytes of a whole run."""
    visits, streams, told = Counter[int](), Counter[int](), Counter[News]()
    for block, news, streamed in zip(itinerary.blocks, itinerary.news, itinerary.streams, strict=True):
        visits[block] += len(news)
        streams[block] += len(streamed)
        told.update(news.values())
    marks = len(itinerary.marks) * len(itinerary.drain) * sizes.mark
    masks_up, masks_down = _masking_bytes(itinerary, sizes.masking) if sizes.masking else (0, 0)
    return TotalBytes(
        sum(count * sizes.update(block).total_bytes for block, count in visits.items()) + masks_up,
        sum(count * sizes.round_start(news) for news, count in told.items())
        + sum(count * sizes.new_value(block).total_bytes for block, count in streams.items() if count)
        + sum(map(sizes.finish, itinerary.drain.values()))
        + marks
        + masks_down,
        visits.total(),
    )


def _masking_bytes(itinerary: Itinerary, masking: MaskingBytes) -> tuple[int, int]:
    """Return the bytes of the messages of secure aggregation, up and down."""
    up = sum(each.advertise + each.shares for each in masking.openings)
    down = sum(each.roster + each.letters for each in masking.openings)
    for drawn, count in Counter(map(tuple, itinerary.news)).items():
        up += count * len(drawn) * (masking.partners + masking.revealed(drawn))
        down += count * len(drawn) * masking.reveal(drawn)
    return up, down


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
    """Return a vector that has a length and no content."""
    return Vector(payload_format, num_elements, torch.empty(0, dtype=torch.uint8))


def _message_bytes(message: Message, vectors: Sequence[Vector]) -> int:
    """Return the bytes of a message as if its hollow vectors had content."""
    payload = sum(payload_bytes(vector.num_elements, vector.format) for vector in vectors)
    return len(to_bytes(message)) + payload
