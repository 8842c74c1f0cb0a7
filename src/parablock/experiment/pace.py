"""How far a run is and how long it will take: of its rounds, and of the stages around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from parablock.report.units import format_duration

BURST_S = 0.5
"""Rounds that are told within so many seconds may have been told together."""

SHORT_S = 0.1
"""A wait below this is not worth a figure, which would be of rounds whose time is made up."""


class Pace:
    """The time that the remaining rounds will take, at the mean pace of this session.

    The first round is not over for a long time, so local steps count as parts of it. Once another is over, the
    first counts no more: it has waited for sites, and warmed up. Scoring is no part of a round's time: each one
    that is due is expected to take as long as the last.

    Args:
        now_s: The clock, in seconds from any origin.
        num_rounds: All rounds of the run.
        first_round: Those that were done before this session.
        num_clients: All clients.
        cohort: Those that train in a round; None: all.
        stages: What is done outside the rounds, such as scoring.
        scored_every: Rounds between scorings, 0 for the last round alone; None: not known.
        delay: Rounds that begin before an earlier one is over.
    """

    def __init__(
        self,
        *,
        now_s: Callable[[], float],
        num_rounds: int,
        first_round: int,
        num_clients: int,
        cohort: int | None,
        stages: Stages,
        scored_every: int | None = None,
        delay: int = 0,
    ) -> None:
        self.num_rounds, self.first_round, self._delay = num_rounds, first_round, delay
        self._now_s, self._start_s, self._end_s = now_s, now_s(), math.inf
        self._stages, self._scored_every, self._is_stopping = stages, scored_every, False
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
        """Return the time that the rounds of this session have taken."""
        return format_duration(min(self._now_s(), self._end_s) - self._start_s)

    def end(self) -> None:
        """Stop the time of the rounds, which are over."""
        self._end_s = min(self._end_s, self._now_s())

    def remaining(self) -> str:
        """Estimate the remaining time at this moment; "" if nothing is done yet."""
        if self.committed >= self.num_rounds:
            return "done"
        if self._is_stopping:
            return "stopping after what has begun"
        done = self.rounds_done()
        seconds = self._seconds_a_round(done)
        if seconds is None:
            return ""
        return f"ETA {format_duration(seconds * (self.num_rounds - done) + self._scoring_left_s())}"

    def _scoring_left_s(self) -> float:
        """Return the seconds that all scorings take which are due, the one under way included."""
        if self._scored_every is None:
            return 0.0
        every = self._scored_every or self.num_rounds
        due = -(-self.num_rounds // every) - self.committed // every  # the last round is scored in any case
        return max(0.0, due * self._stages.last_scoring_s - self._stages.scoring_now_s())

    def _seconds_a_round(self, done: float) -> float | None:
        now_s, since_s, since = self._now_s(), self._start_s, float(self.first_round)
        if (
            self._first_over is not None
            and done >= self._first_over[1] + 1
            and now_s - self._first_over[0] > BURST_S
        ):
            since_s, since = self._first_over
        worked_s = now_s - since_s - self._stages.scoring_s(since_s)
        return worked_s / (done - since) if done > since else None

    def steps_of(self, client_id: int) -> str:
        """Return the local steps of a client in its present round, such as 3/8."""
        _, number, num_steps = self._steps.get(client_id, (0.0, 0, 0))
        return f"{number}/{num_steps}" if num_steps else ""

    def awaited(self) -> str:
        """Say what a run that is asked to stop does first: it ends a round, or itself."""
        if self._end_s < math.inf:
            return "the rounds are over: the model is being scored and written"
        done = self.rounds_done()
        seconds, within = self._seconds_a_round(done), done - self.committed
        number = min(self.committed + 1, self.num_rounds)
        if self.committed + self._delay + 1 >= self.num_rounds:
            return "the last round has begun: the run ends with it, and its model is scored and written"
        self._is_stopping = True
        text = f"stopping at the next round and saving: waiting for the end of round {number}"
        left_s = 0.0 if seconds is None else max(0.0, 1 - within) * seconds
        text = text if left_s < SHORT_S else f"{text}, about {format_duration(left_s)}"
        return f"{text}, and of what has begun of round {number + self._delay}" if self._delay else text


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


class Stages:
    """What a run is at outside its rounds: scoring, and one other stage beside it.

    While the server scores the model, the last of the clients' threads may save a checkpoint; neither ends the
    other's stage.

    Attributes:
        last_scoring_s: The seconds that the last scoring took; 0 before one is over.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._running: dict[bool, Stage] = {}
        self._scorings: list[tuple[float, float]] = []
        self.last_scoring_s = 0.0

    def begin(self, name: str, total: int | None = None, *, scores: bool = False) -> None:
        """End the stage of this kind, and begin another unless its name is empty."""
        now_s, ended = self._now_s(), self._running.pop(scores, None)
        if ended is not None and scores:
            self.last_scoring_s = now_s - ended.began_s
            self._scorings.append((ended.began_s, self.last_scoring_s))
        if name:
            self._running[scores] = Stage(name, total, now_s)

    def done(self, count: int) -> str:
        """Set how many parts of the stage are done; return how far it is, "" where there is none."""
        stage = self._running.get(True) or self._running.get(False)
        if stage is None:
            return ""
        stage.count = count
        return stage.text(self._now_s())

    def end_all(self) -> None:
        """End both stages."""
        self._running.clear()

    def texts(self) -> list[str]:
        """Say how far each stage is."""
        return [stage.text(self._now_s()) for stage in self._running.copy().values()]

    def scoring_now_s(self) -> float:
        """Return the seconds that the scoring under way has taken; 0 where there is none."""
        stage = self._running.get(True)
        return 0.0 if stage is None else self._now_s() - stage.began_s

    def scoring_s(self, since_s: float) -> float:
        """Return the seconds that scorings have taken which began at `since_s` or later."""
        return self.scoring_now_s() + sum(took_s for began_s, took_s in self._scorings.copy() if began_s >= since_s)
