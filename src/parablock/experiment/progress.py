"""Progress of a run: a live display on a terminal, plain lines anywhere else.

A display gets rows of `metrics.jsonl` and the activities of server (None) and clients, but no live object of the
run. Any thread may call `begins` and `ends`, which do one assignment in a dictionary: that needs no lock, and the
display draws a copy.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from parablock.report.units import format_bytes, format_duration, sparkline

MAX_CLIENT_ROWS = 12
MAX_PLAIN_LINES = 100
SPARKLINE_LENGTH = 32


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


class Progress:
    """A display that an engine reports to; leaving the context closes it. Here all reports are dropped."""

    def start(self, num_rounds: int, num_clients: int, first_round: int) -> None:
        """Begin the display of the rounds `first_round` to `num_rounds` − 1; a resumed run begins later than 0."""

    def begins(self, client_id: int | None, activity: str) -> None:
        """Report that a client begins computing, uploading, downloading or waiting."""

    def ends(self, client_id: int | None, activity: str) -> None:
        """Report that a client ends an activity."""

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Show a finished round, from its row of `metrics.jsonl`."""

    def message(self, text: str) -> None:
        """Show a line that belongs to no round."""

    def close(self) -> None:
        """End the display; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_progress(*, console: Console, plain: bool | None = None) -> Progress:
    """Choose the display; with `plain` None, plain lines unless the terminal can move its cursor."""
    if plain is None:
        plain = not console.is_terminal or console.is_dumb_terminal
    return PlainProgress(console=console) if plain else LiveProgress(console=console)


class _Pace:
    """The time that the remaining rounds will take, at the mean pace of this session."""

    def __init__(self, *, now_s: Callable[[], float], num_rounds: int, first_round: int) -> None:
        self.num_rounds, self.first_round = num_rounds, first_round
        self._now_s, self._start_s = now_s, now_s()

    def remaining(self, num_done: int) -> str:
        """Estimate the remaining time after `num_done` rounds of the run."""
        elapsed_s = self._now_s() - self._start_s
        remaining_s = elapsed_s / (num_done - self.first_round) * (self.num_rounds - num_done)
        return f"ETA {format_duration(remaining_s)}" if num_done < self.num_rounds else "done"


class PlainProgress(Progress):
    """One line a round, but no activities; a long run gets about `MAX_PLAIN_LINES` lines and one an evaluation.

    Args:
        console: The output; lines are not wrapped.
        now_s: The clock behind the ETA, in seconds from any origin.
    """

    def __init__(self, *, console: Console, now_s: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now_s = console, now_s

    def start(self, num_rounds: int, num_clients: int, first_round: int) -> None:
        """Write the number of rounds and clients."""
        self._pace = _Pace(now_s=self._now_s, num_rounds=num_rounds, first_round=first_round)
        self._stride = math.ceil((num_rounds - first_round) / MAX_PLAIN_LINES) or 1
        self.message(f"rounds {first_round + 1} to {num_rounds}, {num_clients} clients")

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Write the line of a round; of a long run most rounds are skipped."""
        num_done, pace = row["round_index"] + 1, self._pace
        at_an_end = num_done in (pace.first_round + 1, pace.num_rounds)
        if at_an_end or num_done % self._stride == 0 or row.get("eval_loss") is not None:
            self.message("  ".join([*_describe(row, num_rounds=pace.num_rounds), pace.remaining(num_done)]))

    def message(self, text: str) -> None:
        """Write a line that belongs to no round."""
        self._console.print(Text(text), soft_wrap=True)


def _describe(row: Mapping[str, Any], *, num_rounds: int) -> list[str]:
    """List the facts of one round, as far as its row has them."""
    width = len(str(num_rounds))
    facts = [f"round {row['round_index'] + 1:>{width}}/{num_rounds}"]
    if (block_index := row.get("block_index")) is not None:
        facts.append(f"block {block_index}")
    facts += [
        f"{word} {loss:.3f}"
        for word, key in (("train", "train_loss"), ("eval", "eval_loss"))
        if (loss := row.get(key)) is not None
    ]
    facts.append(f"{format_bytes(row['uplink_bytes'])} up {format_bytes(row['downlink_bytes'])} down")
    return [*facts, format_duration(row["round_s"])]


class LoggedProgress(PlainProgress):
    """The plain lines, sent to the logger `parablock` at level INFO; for runs that are started from Python."""

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console=Console(quiet=True), now_s=now_s)

    def message(self, text: str) -> None:
        """Log a line."""
        logging.getLogger("parablock").info(text)


class LiveProgress(Progress):
    """A display that is redrawn in place: rounds and ETA, losses, bytes, and the activity of each client.

    Args:
        console: A terminal.
        now_s: The clock behind the ETA, in seconds from any origin.
    """

    def __init__(self, *, console: Console, now_s: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now_s = console, now_s
        self._ascii_only = not console.encoding.lower().startswith("utf")
        self._bar = ProgressBar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(complete_style="green", finished_style="green"),
            TextColumn("{task.fields[eta]}"),
            console=console,
        )
        self._num_clients = 0
        self._lit: dict[tuple[int | None, str], bool] = {}
        self._block = "-"
        self._train_losses: deque[float] = deque(maxlen=SPARKLINE_LENGTH)
        self._eval_losses: deque[float] = deque(maxlen=SPARKLINE_LENGTH)
        self._uplink_bytes = self._downlink_bytes = 0
        self._live = Live(self, console=console, refresh_per_second=4)

    def start(self, num_rounds: int, num_clients: int, first_round: int) -> None:
        """Begin the display."""
        self._pace = _Pace(now_s=self._now_s, num_rounds=num_rounds, first_round=first_round)
        self._task = self._bar.add_task("", total=num_rounds, completed=first_round, eta="")
        self._num_clients = num_clients
        self._live.start(refresh=True)

    def begins(self, client_id: int | None, activity: str) -> None:
        """Light the lamp of an activity."""
        self._lit[client_id, activity] = True

    def ends(self, client_id: int | None, activity: str) -> None:
        """Put out the lamp of an activity."""
        self._lit[client_id, activity] = False

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Update the display after a round."""
        num_done = row["round_index"] + 1
        self._bar.update(self._task, completed=num_done, eta=self._pace.remaining(num_done))
        if row.get("block_index") is not None:
            self._block = str(row["block_index"])
        for losses, key in ((self._train_losses, "train_loss"), (self._eval_losses, "eval_loss")):
            if row.get(key) is not None:
                losses.append(row[key])
        self._uplink_bytes += row["uplink_bytes"]
        self._downlink_bytes += row["downlink_bytes"]

    def message(self, text: str) -> None:
        """Write a line above the display."""
        self._console.print(Text(text))

    def close(self) -> None:
        """Stop the display; losses and bytes stay on the screen, the clients do not."""
        self._num_clients = 0
        self._live.stop()

    def __rich__(self) -> Group:
        """Draw the present state; the display's own thread calls this."""
        clients = ("", self._draw_clients()) if self._num_clients else ()
        return Group("", self._bar, self._draw_facts(), *clients)

    def _draw_facts(self) -> Table:
        facts = Table.grid(padding=(0, 2))
        facts.add_row("block", self._block)
        for name, losses in (("train loss", self._train_losses), ("eval loss", self._eval_losses)):
            values = list(losses)
            curve = sparkline(values, ascii_only=self._ascii_only)
            facts.add_row(name, Text(f"{values[-1]:.3f}  {curve}" if values else "-"))
        facts.add_row("sent", f"{format_bytes(self._uplink_bytes)} up, {format_bytes(self._downlink_bytes)} down")
        return facts

    def _draw_clients(self) -> Table:
        """Draw a row of lamps for each client."""
        clients = Table.grid(padding=(0, 2))
        clients.add_row("", *(Text(lamp.title, style="dim") for lamp in _LAMPS))
        lit = self._lit.copy()
        for client_id in range(min(self._num_clients, MAX_CLIENT_ROWS)):
            lamps = (self._draw_lamp(lamp, lit=lit.get((client_id, lamp.activity), False)) for lamp in _LAMPS)
            clients.add_row(f"client {client_id}", *lamps)
        others = range(MAX_CLIENT_ROWS, self._num_clients)
        if others:
            counts = (sum(lit.get((client_id, lamp.activity), False) for client_id in others) for lamp in _LAMPS)
            dots = "..." if self._ascii_only else "…"
            clients.add_row(f"{dots} and {len(others)} more", *(f"{count} of them" for count in counts))
        return clients

    def _draw_lamp(self, lamp: _Lamp, *, lit: bool) -> Text:
        if not lit:
            return Text(("." if self._ascii_only else "·") * _LAMP_WIDTH, style="dim")
        return Text((lamp.ascii_mark if self._ascii_only else lamp.mark) * _LAMP_WIDTH, style=lamp.style)
