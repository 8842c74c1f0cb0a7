"""The clients of a live display: a row of lamps for each, lit while it computes, sends or receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

MAX_CLIENT_ROWS = 12


@dataclass(frozen=True)
class _Lamp:
    """A column of the display, lit for the clients with this activity."""

    activity: str
    title: str
    mark: str
    ascii_mark: str
    style: str


_LAMPS = (
    _Lamp("computing", "compute", "█", "#", "green"),
    _Lamp("uploading", "up", "▲", "^", "cyan"),
    _Lamp("downloading", "down", "▼", "v", "blue"),
)
_LAMP_WIDTH = 7


def draw_clients(
    num_clients: int,
    lit: Mapping[tuple[int | None, str], bool],
    steps_of: Callable[[int], str],
    *,
    ascii_only: bool,
) -> Table:
    """Draw a row of lamps for each client, and its local steps; the last row counts those beyond the first few.

    Args:
        num_clients: All clients.
        lit: (client_id, activity) → whether the client is at it.
        steps_of: The local steps of a client, such as 3/8.
        ascii_only: Whether the terminal shows no other characters.
    """
    table = Table.grid(padding=(0, 2))
    table.add_row("", *(Text(lamp.title, style="dim") for lamp in _LAMPS), Text("step", style="dim"))
    for client_id in range(min(num_clients, MAX_CLIENT_ROWS)):
        lamps = (_draw(lamp, lit.get((client_id, lamp.activity), False), ascii_only) for lamp in _LAMPS)
        table.add_row(f"client {client_id}", *lamps, steps_of(client_id))
    others = range(MAX_CLIENT_ROWS, num_clients)
    if others:
        counts = (sum(lit.get((client_id, lamp.activity), False) for client_id in others) for lamp in _LAMPS)
        dots = "..." if ascii_only else "…"
        table.add_row(f"{dots} and {len(others)} more", *(f"{count} of them" for count in counts))
    return table


def _draw(lamp: _Lamp, is_lit: bool, ascii_only: bool) -> Text:
    if not is_lit:
        return Text(("." if ascii_only else "·") * _LAMP_WIDTH, style="dim")
    return Text((lamp.ascii_mark if ascii_only else lamp.mark) * _LAMP_WIDTH, style=lamp.style)
