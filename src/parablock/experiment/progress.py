"""Progress of a run: a live display on a terminal, plain lines anywhere else.

A display gets rows of `metrics.jsonl`, the stages around the rounds (loading, scoring, writing), the activities of
server (None) and clients, and their local steps, but no live object of the run. Any thread may call `begins`,
`ends` and `step`, which do one assignment in a dictionary: that needs no lock, and the display draws a copy.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from parablock.experiment.lamps import draw_clients
from parablock.experiment.pace import Pace, Stages
from parablock.printable import counted, in_one_line
from parablock.report.units import format_bytes, format_duration, sparkline

MAX_PLAIN_LINES = 100
SILENCE_S = 30.0
SPARKLINE_LENGTH = 32
_NO_PACE = Pace(
    now_s=lambda: 0.0, num_rounds=0, first_round=0, num_clients=1, cohort=None, stages=Stages(lambda: 0.0)
)
"""Stands for the pace before the rounds."""


class Progress:
    """A display that an engine reports to; leaving the context closes it. Here all reports are dropped."""

    _noted: frozenset[str] = frozenset()

    def stage(self, name: str, total: int | None = None, *, is_brief: bool = False, scores: bool = False) -> None:
        """Begin a stage outside the rounds; "" ends it. Scoring goes on while another stage begins and ends.

        Args:
            name: What is done, such as "loading the model".
            total: The number of its parts; None if they cannot be counted.
            is_brief: Whether a log names it only if it takes long.
            scores: Whether the model is scored; `stage("", scores=True)` ends that.
        """

    def done(self, count: int) -> None:
        """Report how many parts of the stage are done."""

    def start(
        self,
        num_rounds: int,
        num_clients: int,
        first_round: int,
        cohort: int | None = None,
        *,
        scored_every: int | None = None,
        earlier: Sequence[Mapping[str, Any]] = (),
        num_blocks: int | None = None,
        delay: int = 0,
    ) -> None:
        """Begin the display of the rounds `first_round` to `num_rounds` − 1; a resumed run begins later than 0.

        Args:
            num_rounds: All rounds of the run.
            num_clients: All clients.
            first_round: The number of rounds that are done.
            cohort: The number of clients that train in a round; None: all.
            scored_every: Rounds between scorings, 0 for the last round alone; None: not known.
            earlier: The rows of the rounds that are done, as far as they are known.
            num_blocks: The number of blocks; of 1, which is all that is trained, nothing is said. None: not known.
            delay: Rounds that begin before an earlier one is over.
        """

    def rounds_over(self) -> None:
        """Report that all rounds are over; what follows is no part of their time."""

    def step(self, client_id: int, number: int, num_steps: int) -> None:
        """Report that a client has taken local step `number` of `num_steps` of its round."""

    def awaited(self) -> str:
        """Say what a run that is asked to stop does first; "" where no round has begun."""
        return ""

    def begins(self, client_id: int | None, activity: str) -> None:
        """Report that a client begins computing, uploading, downloading or waiting."""

    def ends(self, client_id: int | None, activity: str) -> None:
        """Report that a client ends an activity."""

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Show a finished round, from its row of `metrics.jsonl`."""

    def message(self, text: str) -> None:
        """Show a line that belongs to no round."""

    def note(self, text: str) -> None:
        """Print a line about the inputs of a run; once, if several runs have it in common."""
        if text not in self._noted:
            self._noted |= {text}
            self.message(text)

    def close(self) -> None:
        """End the display; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_progress(*, console: Console, plain: bool | None = None, names_stages: bool = True) -> Progress:
    """Choose the display.

    Args:
        console: The output.
        plain: Whether it is plain lines; None: unless the terminal can move its cursor.
        names_stages: Whether plain lines name each stage, or only one that takes long.
    """
    if plain is None:
        plain = not console.is_terminal or console.is_dumb_terminal
    return PlainProgress(console=console, names_stages=names_stages) if plain else LiveProgress(console=console)


class _Paced(Progress):
    """What both displays share: the stages, and the pace of the rounds."""

    def __init__(self, console: Console, now_s: Callable[[], float]) -> None:
        self._console, self._now_s, self._pace, self._stages = console, now_s, _NO_PACE, Stages(now_s)
        self._has_blocks = True

    def stage(self, name: str, total: int | None = None, *, is_brief: bool = False, scores: bool = False) -> None:
        """Show a stage, with the time that it takes."""
        del is_brief  # it is drawn over
        self._stages.begin(name, total, scores=scores)

    def done(self, count: int) -> None:
        """Show how far the stage is."""
        self._stages.done(count)

    def start(
        self,
        num_rounds: int,
        num_clients: int,
        first_round: int,
        cohort: int | None = None,
        *,
        earlier: Sequence[Mapping[str, Any]] = (),
        num_blocks: int | None = None,
        **more: Any,
    ) -> None:
        """Begin the rounds."""
        del earlier
        self._has_blocks = num_blocks != 1
        self._stages.begin("")
        self._pace = Pace(
            now_s=self._now_s,
            num_rounds=num_rounds,
            first_round=first_round,
            num_clients=num_clients,
            cohort=cohort,
            stages=self._stages,
            **more,
        )

    def rounds_over(self) -> None:
        """Stop the time of the rounds."""
        self._pace.end()

    def step(self, client_id: int, number: int, num_steps: int) -> None:
        """Show a local step."""
        self._pace.step(client_id, number, num_steps)

    def awaited(self) -> str:
        """Say what a run that is asked to stop does first; "" where no round has begun."""
        return self._pace.awaited() if self._pace is not _NO_PACE else ""


class PlainProgress(_Paced):
    """One line a round, but no activities; a long run gets about `MAX_PLAIN_LINES` lines and one an evaluation.

    Where a round or a stage takes long, a line every `SILENCE_S` seconds says how far it is.

    Args:
        console: The output; lines are not wrapped.
        now_s: The clock behind the ETA, in seconds from any origin.
        names_stages: Whether each stage is named, or only one that takes long.
    """

    def __init__(
        self, *, console: Console, now_s: Callable[[], float] = time.monotonic, names_stages: bool = True
    ) -> None:
        super().__init__(console, now_s)
        self._names_stages, self._said_s = names_stages, now_s()

    def stage(self, name: str, total: int | None = None, *, is_brief: bool = False, scores: bool = False) -> None:
        """Write the name of the stage."""
        super().stage(name, total, is_brief=is_brief, scores=scores)
        if name and self._names_stages and not is_brief:
            self.message(name)

    def done(self, count: int) -> None:
        """Write how far the stage is, if nothing was written for long."""
        text = self._stages.done(count)
        if text and self._now_s() - self._said_s > SILENCE_S:
            self.message(text)

    def start(
        self, num_rounds: int, num_clients: int, first_round: int, cohort: int | None = None, **more: Any
    ) -> None:
        """Write the number of rounds and clients."""
        super().start(num_rounds, num_clients, first_round, cohort, **more)
        self._stride = math.ceil((num_rounds - first_round) / MAX_PLAIN_LINES) or 1
        self.message(f"rounds {first_round + 1} to {num_rounds}, {counted(num_clients, 'client')}")

    def step(self, client_id: int, number: int, num_steps: int) -> None:
        """Write how far the round is, if nothing was written for long."""
        super().step(client_id, number, num_steps)
        pace = self._pace
        if self._now_s() - self._said_s > SILENCE_S:
            done = f"round {int(pace.rounds_done()) + 1}/{pace.num_rounds}  client {client_id}"
            self.message(f"{done}  step {number}/{num_steps}  {pace.elapsed()}  {pace.remaining()}")

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Write the line of a round; of a long run most rounds are skipped."""
        num_done, pace = row["round_index"] + 1, self._pace
        pace.rounds_done(num_done)
        at_an_end = num_done in (pace.first_round + 1, pace.num_rounds)
        if at_an_end or num_done % self._stride == 0 or row.get("eval_loss") is not None:
            facts = _describe(row, num_rounds=pace.num_rounds, has_blocks=self._has_blocks)
            self.message("  ".join([*facts, pace.remaining()]))

    def message(self, text: str) -> None:
        """Write a line that belongs to no round."""
        self._said_s = self._now_s()
        self._console.print(Text(in_one_line(text)), soft_wrap=True)


def _describe(row: Mapping[str, Any], *, num_rounds: int, has_blocks: bool) -> list[str]:
    """List the facts of one round, as far as its row has them."""
    width = len(str(num_rounds))
    facts = [f"round {row['round_index'] + 1:>{width}}/{num_rounds}"]
    if has_blocks and (block_index := row.get("block_index")) is not None:
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


class LiveProgress(_Paced):
    """A display that is redrawn in place: the stage, rounds and ETA, losses, bytes, each client's activity.

    It moves from the moment that its context is entered, also while nothing reports to it.

    Args:
        console: A terminal.
        now_s: The clock behind the ETA, in seconds from any origin.
    """

    def __init__(self, *, console: Console, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, now_s)
        self._ascii_only = not console.encoding.lower().startswith("utf")
        turning = "line" if self._ascii_only else "dots"
        self._bar = ProgressBar(
            SpinnerColumn(turning, style=""),  # turns while a round of minutes changes nothing else
            TextColumn("round"),
            TextColumn("{task.fields[at]}"),
            BarColumn(complete_style="green", finished_style="green"),
            TextColumn("{task.fields[times]}"),
            console=console,
            get_time=now_s,
        )
        self._num_clients = 0
        self._lit: dict[tuple[int | None, str], bool] = {}
        self._block = "-"
        self._train_losses: deque[float] = deque(maxlen=SPARKLINE_LENGTH)
        self._eval_losses: deque[float] = deque(maxlen=SPARKLINE_LENGTH)
        self._uplink_bytes = self._downlink_bytes = 0
        self._turning, self._spinners = turning, list[Spinner]()
        self._live = Live(self, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def start(
        self,
        num_rounds: int,
        num_clients: int,
        first_round: int,
        cohort: int | None = None,
        *,
        earlier: Sequence[Mapping[str, Any]] = (),
        **more: Any,
    ) -> None:
        """Begin the display of rounds."""
        for before in self._bar.task_ids:  # a comparison shows one run after the other
            self._bar.remove_task(before)
        self._task = self._bar.add_task("", total=num_rounds, completed=first_round, at="", times="")
        self._train_losses.clear()
        self._eval_losses.clear()
        self._uplink_bytes = self._downlink_bytes = 0
        for row in earlier:
            self._add(row)
        super().start(num_rounds, num_clients, first_round, cohort, earlier=earlier, **more)
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
        self._pace.rounds_done(row["round_index"] + 1)
        self._add(row)

    def _add(self, row: Mapping[str, Any]) -> None:
        if row.get("block_index") is not None:
            self._block = str(row["block_index"])
        for losses, key in ((self._train_losses, "train_loss"), (self._eval_losses, "eval_loss")):
            if row.get(key) is not None:
                losses.append(row[key])
        self._uplink_bytes += row["uplink_bytes"]
        self._downlink_bytes += row["downlink_bytes"]

    def message(self, text: str) -> None:
        """Write a line above the display."""
        self._console.print(Text(in_one_line(text)))

    def close(self) -> None:
        """Stop the display; losses and bytes stay on the screen, stages and clients do not."""
        self._num_clients = 0
        self._stages.end_all()
        self._bar.columns = tuple(column for column in self._bar.columns if not isinstance(column, SpinnerColumn))
        self._live.stop()

    def __rich__(self) -> Group:
        """Draw the present state; the display's own thread calls this."""
        parts: list[RenderableType] = []
        if self._pace is not _NO_PACE:
            self._move_bar()
            parts += ["", self._bar, self._draw_facts()]
            if self._num_clients:
                lit, steps_of = self._lit.copy(), self._pace.steps_of
                parts += ["", draw_clients(self._num_clients, lit, steps_of, ascii_only=self._ascii_only)]
        texts = self._stages.texts()
        self._spinners += [Spinner(self._turning) for _ in texts[len(self._spinners) :]]
        for spinner, text in zip(self._spinners, texts, strict=False):
            spinner.update(text=Text(in_one_line(text)))
            parts.append(spinner)
        return Group(*parts)

    def _move_bar(self) -> None:
        pace = self._pace
        times = "  ".join(text for text in (pace.elapsed(), pace.remaining()) if text)
        self._bar.update(
            self._task, completed=pace.rounds_done(), at=f"{pace.committed}/{pace.num_rounds}", times=times
        )

    def _draw_facts(self) -> Table:
        facts = Table.grid(padding=(0, 2))
        if self._has_blocks:
            facts.add_row("block", self._block)
        for name, losses in (("train loss", self._train_losses), ("eval loss", self._eval_losses)):
            values = list(losses)
            curve = sparkline(values, ascii_only=self._ascii_only)
            facts.add_row(name, Text(f"{values[-1]:.3f}  {curve}" if values else "-"))
        facts.add_row("sent", f"{format_bytes(self._uplink_bytes)} up, {format_bytes(self._downlink_bytes)} down")
        return facts
