"""The timeline of a run as a Plotly figure (Gantt chart): three rows for each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from parablock.report.figures import Figure, tidy
from parablock.report.units import format_bytes
from parablock.trace import TRANSFERS, Span, TransferPiece, cut_transfers

MAX_CLIENTS = 20
MAX_BARS = 16_000
MAX_GAP_S = 0.002
FIRST_ROUNDS = 8

# For each activity: the row's distance from client i, and the thickness of its bars.
_ROWS = {"computing": (-0.19, 0.34), "uploading": (0.09, 0.16), "downloading": (0.28, 0.16)}


def gantt_figure(spans: Sequence[Span]) -> Figure:
    """Draw when each client computed, sent and received, which transfers its computation hid, and when the server
    scored the model between rounds, which holds up everybody.

    Only the first `MAX_CLIENTS` clients are drawn, and the rounds that fit into `MAX_BARS` bars; `num_clients` and
    `num_rounds` of the figure say how many. It opens with the first `FIRST_ROUNDS` rounds in view; `views` holds
    that range and the range of all rounds.
    """
    own = [span for span in spans if span.client_id is not None and span.client_id < MAX_CLIENTS]
    computing = [span for span in own if span.activity == "computing"]
    pieces = cut_transfers([*computing, *_join_chunks(own)])
    num_rounds = _rounds_that_fit(computing, pieces)
    computed = [(span, span.start_s, span.duration_s) for span in computing if _round(span) < num_rounds]
    hidden, exposed = (
        [(p.span, p.start_s, p.duration_s) for p in pieces if p.is_hidden is kind and _round(p.span) < num_rounds]
        for kind in (True, False)
    )
    scoring = [
        (span, span.start_s, span.duration_s)
        for span in spans
        if span.activity == "evaluating" and span.duration_s > 0 and _round(span) < num_rounds
    ]
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
        "data": [
            *([_scoring(scoring, clients)] if scoring else []),
            _bars("computing", "var(--computing)", computed),
            _bars("hidden", "var(--hidden)", hidden),
            _bars("not hidden", "var(--exposed)", exposed),
        ],
        "layout": layout,
        "views": views,
        "num_rounds": num_rounds,
        "num_clients": len(clients),
    }


def _bars(name: str, color: str, pieces: Sequence[tuple[Span, float, float]]) -> Figure:
    """Draw parts of spans, each with its start and duration, as bars of one colour."""
    rows = [(span.client_id or 0, *_ROWS[span.activity]) for span, _, _ in pieces]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "base": [tidy(start_s) for _, start_s, _ in pieces],
        "x": [tidy(duration_s) for _, _, duration_s in pieces],
        "y": [round(client_id + offset, 2) for client_id, offset, _ in rows],
        "width": [width for _, _, width in rows],
        "customdata": [
            f"client {span.client_id} {span.activity}, round {_round(span) + 1}{_subject(span)}"
            for span, _, _ in pieces
        ],
        "marker": {"color": color, "line": {"width": 0}},
        "hovertemplate": f"%{{customdata}}<br>%{{base:.2f}} – %{{x:.2f}} s, {name}<extra></extra>",
    }


def _scoring(pieces: Sequence[tuple[Span, float, float]], clients: Sequence[int]) -> Figure:
    """Draw the scorings as bars behind all clients."""
    first, last = min(clients, default=0), max(clients, default=0)
    return _bars("scoring the model", "var(--grid)", []) | {
        "base": [tidy(start_s) for _, start_s, _ in pieces],
        "x": [tidy(duration_s) for _, _, duration_s in pieces],
        "y": [(first + last) / 2] * len(pieces),
        "width": [last - first + 0.9] * len(pieces),
        "customdata": [f"scoring the model after round {_round(span) + 1}" for span, _, _ in pieces],
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
