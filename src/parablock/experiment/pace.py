"""How far a run is and how long it will take: of its rounds, and of the stages around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parablock.report.units import format_duration

BURST_S = 0.5
"""Rounds that are told within so many seconds may have been told together."""


class Pace:
    """The time that the remaining rounds will take, at the mean pace of this session.

    The first round is not over for a long time, so local steps count as parts of it. Once another is over, the
    first counts no more: it has waited for sites, and warmed up.
    """

    def __init__(
        self, *, now_s: Callable[[], float], num_rounds: int, first_round: int, num_clients: int, cohort: int | None
    ) -> None:
        self.num_rounds, self.first_round = num_rounds, first_round
        self._now_s, self._start_s = now_s, now_s()
        self._cohort = cohort or num_clients
        self.committed = first_round
        self._first_over: tuple[float, float] | None = None
        self._steps: dict[int, tuple[float, int, int]] = {}

    def step(self, client_id: int, number: int, num_steps: int) -> None:
        """Count a local step as its part of the client's round."""
        rounds = self._steps.get(client_id, (0.0, 0, 0))[0]
        self._steps[client_id] = rounds + 1 / num_steps, number, num_steps

    def rounds_done(self, num_done: int | None = None) -> float:
        """Return the rounds of the run that are done, with the part that the local steps amount to."""
        if num_done is not None:
            self.committed = num_done
        stepped = sum(rounds for rounds, _, _ in self._steps.copy().values()) / self._cohort
        done = min(self.num_rounds, max(self.committed, self.first_round + stepped))
        if num_done is not None and self._first_over is None:
            self._first_over = self._now_s(), done
        return done

    def elapsed(self) -> str:
        """Return the time since the rounds of this session began."""
        return format_duration(self._now_s() - self._start_s)

    def remaining(self) -> str:
        """Estimate the remaining time at this moment; "" if nothing is done yet."""
        if self.committed >= self.num_rounds:
            return "done"
        done = self.rounds_done()
        seconds = self._seconds_a_round(done)
        return "" if seconds is None else f"ETA {format_duration(seconds * (self.num_rounds - done))}"

    def _seconds_a_round(self, done: float) -> float | None:
        now_s, since_s, since = self._now_s(), self._start_s, float(self.first_round)
        if (
            self._first_over is not None
            and done >= self._first_over[1] + 1
            and now_s - self._first_over[0] > BURST_S
        ):
            since_s, since = self._first_over
        return (now_s - since_s) / (done - since) if done > since else None

    def steps_of(self, client_id: int) -> str:
        """Return the local steps of a client in its present round, such as 3/8."""
        _, number, num_steps = self._steps.get(client_id, (0.0, 0, 0))
        return f"{number}/{num_steps}" if num_steps else ""

    def awaited(self) -> str:
        """Say which round is not over, and how long it may take."""
        done = self.rounds_done()
        seconds, within = self._seconds_a_round(done), done - self.committed
        text = f"the end of round {min(self.committed + 1, self.num_rounds)}"
        return text if seconds is None else f"{text}, about {format_duration(max(0.0, 1 - within) * seconds)}"


@dataclass
class Stage:
    """A stage outside the rounds: its name, the parts that it has, when it began, and the parts that are done."""

    name: str
    total: int | None
    began_s: float
    count: int = 0

    def text(self, now_s: float) -> str:
        """Say how far the stage is, how long it has taken, and how long it will."""
        elapsed_s = now_s - self.began_s
        facts = [self.name, *([f"{self.count}/{self.total}"] if self.total else []), format_duration(elapsed_s)]
        if self.total and self.count:
            facts.append(f"ETA {format_duration(elapsed_s / self.count * (self.total - self.count))}")
        return "  ".join(facts)
