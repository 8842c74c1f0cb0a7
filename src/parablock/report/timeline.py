"""The timeline of a run as text: compute and communication of each client, one above the other."""

from __future__ import annotations

from collections.abc import Sequence

from parablock.trace import Span

LEGEND = "█ computing   ▲ uploading   ▼ downloading   · idle"
_MARKS = {"computing": "█", "uploading": "▲", "downloading": "▼"}


def draw_timeline(
    spans: Sequence[Span], *, width: int = 88, max_clients: int = 4, max_rounds: int = 8
) -> list[str]:
    """Draw the first rounds of the first clients, two lines each: compute above, communication below.

    The time axis is `width` characters long. An empty trace has no lines.
    """
    moving = [span for span in spans if span.client_id is not None and span.activity in _MARKS]
    early = [span for span in moving if span.facts.get("round_index", 0) < max_rounds]
    if not early:
        return []
    begin = min(span.start_s for span in early)
    end = max(
        span.start_s + span.duration_s for span in early if span.lane == "compute" or len(early) == len(moving)
    )
    shown = [span for span in moving if span.start_s < end]
    scale = width / max(end - begin, 1e-9)
    clients = sorted({span.client_id for span in shown if span.client_id is not None})
    lines = []
    for client_id in clients[:max_clients]:
        for lane in ("compute", "communication"):
            cells = ["·"] * width
            for span in shown:
                if span.client_id == client_id and span.lane == lane:
                    first = int((span.start_s - begin) * scale)
                    last = max(first + 1, round((span.start_s + span.duration_s - begin) * scale))
                    for k in range(first, min(last, width)):
                        cells[k] = _MARKS[span.activity]
            lines.append(f"client {client_id:<3} {lane[:4]:<4} {''.join(cells)}")
    axis = f"{begin:.0f} s".ljust(width - 8) + f"{end:.0f} s".rjust(8)
    lines.append(f"{'':15} {axis}")
    if len(clients) > max_clients:
        lines.append(f"… and {len(clients) - max_clients} more clients")
    return [*lines, f"{'':15} {LEGEND}"]
