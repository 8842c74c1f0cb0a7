"""Which part of each transfer ran under the same client's computation, and which it had to wait for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parablock.trace import Span

TRANSFERS = ("uploading", "downloading")


@dataclass(frozen=True)
class Piece:
    """A part of a transfer that is hidden from its begin to its end, or not at all.

    Attributes:
        span: The whole transfer.
        start_s: Seconds since the run began.
        duration_s: Seconds; more than zero.
        is_hidden: Whether its client computed all the while.
    """

    span: Span
    start_s: float
    duration_s: float
    is_hidden: bool


@dataclass(frozen=True)
class ClientTimes:
    """Seconds of one client over a whole run; both directions of its link count."""

    compute_s: float = 0.0
    communication_s: float = 0.0
    hidden_s: float = 0.0

    @property
    def hidden_fraction(self) -> float:
        """Which part of the communication cost no time; 0 where there was none."""
        return self.hidden_s / self.communication_s if self.communication_s else 0.0


def cut_transfers(spans: Iterable[Span]) -> list[Piece]:
    """Cut every transfer where its client begins or ends to compute.

    Args:
        spans: A run's trace; what a client computes does not overlap.

    Returns:
        Pieces that cover all transfers, in the order of their begin.
    """
    spans = list(spans)
    computing: dict[int | None, list[Span]] = defaultdict(list)
    for span in sorted((span for span in spans if span.activity == "computing"), key=lambda span: span.start_s):
        computing[span.client_id].append(span)
    pieces: list[Piece] = []
    progress: dict[int | None, int] = defaultdict(int)
    for span in sorted((span for span in spans if span.activity in TRANSFERS), key=lambda span: span.start_s):
        own = computing[span.client_id]
        first = progress[span.client_id]
        while first < len(own) and _end(own[first]) <= span.start_s:
            first += 1  # the next transfers begin no earlier, so they skip it too
        progress[span.client_id] = first
        pieces.extend(_cut(span, own[first:]))
    return sorted(pieces, key=lambda piece: piece.start_s)


def times_by_client(spans: Iterable[Span]) -> dict[int, ClientTimes]:
    """Add up each client's seconds of computing, of communication, and of communication that was hidden."""
    spans = list(spans)
    compute, moving, hidden = (
        defaultdict[int, float](float),
        defaultdict[int, float](float),
        defaultdict[int, float](float),
    )
    for span in spans:
        if span.activity == "computing" and span.client_id is not None:
            compute[span.client_id] += span.duration_s
    for piece in cut_transfers(spans):
        if piece.span.client_id is not None:
            moving[piece.span.client_id] += piece.duration_s
            hidden[piece.span.client_id] += piece.duration_s * piece.is_hidden
    return {
        client_id: ClientTimes(compute[client_id], moving[client_id], hidden[client_id])
        for client_id in sorted({*compute, *moving})
    }


def _cut(transfer: Span, computing: Sequence[Span]) -> list[Piece]:
    pieces, now, end = [], transfer.start_s, _end(transfer)
    for span in computing:
        if span.start_s >= end:
            break
        pieces.append((now, span.start_s, False))
        pieces.append((max(now, span.start_s), min(end, _end(span)), True))
        now = min(end, _end(span))
    pieces.append((now, end, False))
    return [Piece(transfer, start, stop - start, hidden) for start, stop, hidden in pieces if stop > start]


def _end(span: Span) -> float:
    return span.start_s + span.duration_s
