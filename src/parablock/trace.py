"""The timeline of a run: spans of all activities, hidden communication, and Chrome trace files."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.clock import Clock

TRANSFERS = ("uploading", "downloading")


@dataclass(frozen=True)
class Span:
    """An activity of a client or the server.

    Attributes:
        client_id: The client; None for the server.
        lane: compute | communication | server.
        activity: computing, uploading, downloading, waiting, aggregating, evaluating, checkpointing.
        start_s: Seconds since the run began.
        duration_s: Seconds.
        facts: Details: round_index, block_index, payload_bytes.
    """

    client_id: int | None
    lane: str
    activity: str
    start_s: float
    duration_s: float
    facts: dict[str, Any]


class Trace:
    """The record of a run's spans; every thread appends to it, and it is read after the run.

    For live display, `on_begin` and `on_end` are called with (client_id, activity) when a span begins and ends.
    """

    def __init__(
        self,
        clock: Clock,
        on_begin: Callable[[int | None, str], None] | None = None,
        on_end: Callable[[int | None, str], None] | None = None,
    ) -> None:
        self.clock, self.spans, self._on_begin, self._on_end = clock, list[Span](), on_begin, on_end

    @contextmanager
    def span(self, client_id: int | None, lane: str, activity: str, **facts: Any) -> Iterator[None]:
        """Record the time of the block, also if it fails."""
        start_s = self.begin(client_id, activity)
        try:
            yield
        finally:
            self.end(client_id, lane, activity, start_s, **facts)

    def begin(self, client_id: int | None, activity: str) -> float:
        """Announce an activity; return the time."""
        if self._on_begin is not None:
            self._on_begin(client_id, activity)
        return self.clock.now()

    def end(self, client_id: int | None, lane: str, activity: str, start_s: float, **facts: Any) -> None:
        """Record an activity that began at `start_s` and ends now."""
        self.spans.append(Span(client_id, lane, activity, start_s, self.clock.now() - start_s, facts))
        if self._on_end is not None:
            self._on_end(client_id, activity)


@dataclass(frozen=True)
class TransferPiece:
    """A part of a transfer during which its client computed all the time (`is_hidden`), or never."""

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
        """The share of the communication that cost no time; 0 without communication."""
        return self.hidden_s / self.communication_s if self.communication_s else 0.0


def cut_transfers(spans: Iterable[Span]) -> list[TransferPiece]:
    """Cut every transfer where its client begins or ends a computation; return the pieces by start time.

    The computing spans of one client do not overlap.
    """
    computing: dict[int | None, list[Span]] = defaultdict(list)
    transfers: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.activity == "computing":
            computing[span.client_id].append(span)
        elif span.activity in TRANSFERS:
            transfers.append(span)
    pieces: list[TransferPiece] = []
    for transfer in transfers:
        own = computing[transfer.client_id]
        pieces.extend(_cut(transfer, own[bisect_right(own, transfer.start_s, key=_end) :]))
    return sorted(pieces, key=lambda piece: piece.start_s)


def times_by_client(spans: Iterable[Span]) -> dict[int, ClientTimes]:
    """Add up each client's seconds of computation, communication and hidden communication."""
    spans = list(spans)
    compute, moving, hidden = (defaultdict[int, float](float) for _ in range(3))
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


def _cut(transfer: Span, computing: Sequence[Span]) -> list[TransferPiece]:
    pieces, now, end = [], transfer.start_s, _end(transfer)
    for span in computing:
        if span.start_s >= end:
            break
        pieces.append((now, span.start_s, False))
        pieces.append((max(now, span.start_s), min(end, _end(span)), True))
        now = min(end, _end(span))
    pieces.append((now, end, False))
    return [TransferPiece(transfer, start, stop - start, hidden) for start, stop, hidden in pieces if stop > start]


def _end(span: Span) -> float:
    return span.start_s + span.duration_s


def write_chrome_trace(spans: list[Span], path: Path) -> None:
    """Write spans as Chrome trace events: one process for each client and one for the server.

    Perfetto and chrome://tracing open the file. Times are microseconds; waiting shows as a gap.
    """
    events: list[dict[str, Any]] = []
    lanes = {"server": 0, "compute": 1, "communication": 2}
    tracks = sorted(
        {(span.client_id, span.lane) for span in spans}, key=lambda t: (t[0] is not None, t[0] or 0, t[1])
    )
    for client_id, lane in tracks:
        pid = 0 if client_id is None else client_id + 1
        process = "server" if client_id is None else f"client {client_id}"
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process}})
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": lanes[lane], "args": {"name": lane}})
    for span in spans:
        if span.activity == "waiting":
            continue
        events.append(
            {
                "ph": "X",
                "name": span.activity,
                "cat": span.lane,
                "pid": 0 if span.client_id is None else span.client_id + 1,
                "tid": lanes[span.lane],
                "ts": round(span.start_s * 1e6, 3),
                "dur": round(span.duration_s * 1e6, 3),
                "args": span.facts,
            }
        )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def read_chrome_trace(path: Path) -> list[Span]:
    """Read the spans from a file that `write_chrome_trace` wrote."""
    lanes = ("server", "compute", "communication")
    return [
        Span(
            None if event["pid"] == 0 else event["pid"] - 1,
            lanes[event["tid"]],
            event["name"],
            event["ts"] / 1e6,
            event["dur"] / 1e6,
            event["args"],
        )
        for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        if event["ph"] == "X"
    ]
