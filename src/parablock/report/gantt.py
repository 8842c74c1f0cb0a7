"""The timeline of a run as a Plotly figure (Gantt chart): three rows for each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from parablock.report.figures import Figure, tidy
from parablock.report.units import format_bytes
from parablock.trace import TRANSFERS, Span, TransferPiece, cut_transfers

MAX_CLIENTS = 20
MAX_BARS = 16_000
MAX_GAP_S = 0.002
FIRST_ROUNDS = 8

# For each activity: the row's distance from client i, and the thickness of its bars.
_ROWS = {"computing": (-0.19, 0.34), "uploading": (0.09, 0.16), "downloading": (0.28, 0.16)}


@dataclass
class _Bars:
    """All bars of one colour, column by column."""

    name: str
    color: str
    starts: list[float | None] = field(default_factory=list)
    durations: list[float | None] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, span: Span, start_s: float, duration_s: float) -> None:
        assert span.client_id is not None
        offset, width = _ROWS[span.activity]
        self.starts.append(tidy(start_s))
        self.durations.append(tidy(duration_s))
        self.rows.append(round(span.client_id + offset, 2))
        self.widths.append(width)
        self.texts.append(f"client {span.client_id} {span.activity}, round {_round(span) + 1}{_subject(span)}")

    def trace(self) -> Figure:
        return {
            "type": "bar",
            "orientation": "h",
            "name": self.name,
            "base": self.starts,
            "x": self.durations,
            "y": self.rows,
            "width": self.widths,
            "customdata": self.texts,
            "marker": {"color": self.color, "line": {"width": 0}},
            "hovertemplate": f"%{{customdata}}<br>%{{base:.2f}} – %{{x:.2f}} s, {self.name}<extra></extra>",
        }


def gantt_figure(spans: Sequence[Span]) -> Figure:
    """Draw when each client computed, sent and received, and which transfers its computation hid.

    Args:
        spans: A run's trace. Only the first `MAX_CLIENTS` clients are drawn, and the rounds that fit into
            `MAX_BARS` bars.

    Returns:
        A figure that opens with the first `FIRST_ROUNDS` rounds in view. `views` holds that range and the range
        of all rounds; `num_rounds` and `num_clients` say how much is drawn.
    """
    own = [span for span in spans if span.client_id is not None and span.client_id < MAX_CLIENTS]
    computing = [span for span in own if span.activity == "computing"]
    pieces = cut_transfers([*computing, *_join_chunks(own)])
    num_rounds = _rounds_that_fit(computing, pieces)
    computed = _Bars("computing", "var(--computing)")
    hidden, exposed = _Bars("hidden", "var(--hidden)"), _Bars("not hidden", "var(--exposed)")
    for span in computing:
        if _round(span) < num_rounds:
            computed.add(span, span.start_s, span.duration_s)
    for piece in pieces:
        if _round(piece.span) < num_rounds:
            (hidden if piece.is_hidden else exposed).add(piece.span, piece.start_s, piece.duration_s)
    clients = sorted({span.client_id for span in own if span.client_id is not None})
    first = {"first rounds": _extent(computing, FIRST_ROUNDS)} if num_rounds > FIRST_ROUNDS else {}
    views = {**first, "all rounds": _extent(own, num_rounds)}
    layout = {
        "barmode": "overlay",
        "height": 34 * len(clients) + 120,
        "hovermode": "closest",
        "xaxis": {"title": {"text": "seconds"}, "range": next(iter(views.values()))},
        "yaxis": {
            "autorange": False,
            "range": [max(clients, default=0) + 0.6, -0.6],
            "fixedrange": True,
            "showgrid": False,
            "tickvals": clients,
            "ticktext": [f"client {client_id}" for client_id in clients],
        },
    }
    return {
        "data": [bars.trace() for bars in (computed, hidden, exposed)],
        "layout": layout,
        "views": views,
        "num_rounds": num_rounds,
        "num_clients": len(clients),
    }


def _join_chunks(spans: Sequence[Span]) -> list[Span]:
    """Join the chunks of a streamed message that follow each other without a gap."""
    transfers = [span for span in spans if span.activity in TRANSFERS]
    joined: list[Span] = []
    for span in sorted(transfers, key=lambda span: (span.client_id or 0, span.activity, span.start_s)):
        last = joined[-1] if joined else span
        gap_s = span.start_s - last.start_s - last.duration_s
        is_same = (last.client_id, last.activity, _round(last)) == (span.client_id, span.activity, _round(span))
        if joined and is_same and abs(gap_s) <= MAX_GAP_S:
            payload_bytes = last.facts.get("payload_bytes", 0) + span.facts.get("payload_bytes", 0)
            duration_s = span.start_s + span.duration_s - last.start_s
            facts = {**last.facts, "payload_bytes": payload_bytes}
            joined[-1] = replace(last, duration_s=duration_s, facts=facts)
        else:
            joined.append(span)
    return joined


def _subject(span: Span) -> str:
    if "block_index" in span.facts:
        return f", block {span.facts['block_index']}"
    return f", {format_bytes(span.facts['payload_bytes'])}" if "payload_bytes" in span.facts else ""


def _rounds_that_fit(computing: Sequence[Span], pieces: Sequence[TransferPiece]) -> int:
    rounds = sorted([_round(span) for span in computing] + [_round(piece.span) for piece in pieces])
    return rounds[-1] + 1 if 0 < len(rounds) <= MAX_BARS else rounds[MAX_BARS] if rounds else 0


def _round(span: Span) -> int:
    return int(span.facts.get("round_index", 0))


def _extent(spans: Sequence[Span], num_rounds: int) -> list[float | None]:
    ends = [span.start_s + span.duration_s for span in spans if _round(span) < num_rounds]
    return [0, tidy(max(ends, default=1.0) * 1.01)]
