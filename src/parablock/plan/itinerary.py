"""Replay the schedule of a run without tensors: blocks, cohorts, and the news that each message brings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Literal

from parablock.algorithm.parablock import NEVER
from parablock.algorithm.schedule import cohort, next_block
from parablock.config.keys import RunConfig
from parablock.experiment.engines import encoding_of

News = tuple[tuple[int, Literal["streamed", "fresh", "missed"]], ...]
"""New values of blocks in a message: streamed ahead of it, fresh (the client held the value before), or missed."""


@dataclass(frozen=True)
class Itinerary:
    """The schedule of a run.

    Attributes:
        blocks: b_t of each round.
        news: For each round, client of the cohort → news in its `RoundStart`.
        streams: For each round, the clients to which its new value is streamed.
        drain: Client → news in its `Finish`.
        marks: The rounds that a checkpoint mark precedes.
    """

    blocks: tuple[int, ...]
    news: tuple[dict[int, News], ...]
    streams: tuple[tuple[int, ...], ...]
    drain: dict[int, News]
    marks: frozenset[int]


def walk(config: RunConfig, num_blocks: int, delay: int) -> Itinerary:
    """Follow the server through all rounds.

    The delay may differ from the configured one. The schedule `importance` depends on measured deltas; here all
    blocks count as equal.
    """
    return _Walk(config, num_blocks, delay).itinerary()


class _Walk:
    def __init__(self, config: RunConfig, num_blocks: int, delay: int) -> None:
        self._config, self._num_blocks, self._delay = config, num_blocks, delay
        self._num_rounds = config.federation.num_rounds
        self._history: list[int] = []
        self._streams: list[tuple[int, ...]] = []
        self._versions, self._before = (NEVER,) * num_blocks, [NEVER] * num_blocks
        self._held = dict.fromkeys(range(config.federation.num_clients), self._versions)
        self._ahead: dict[tuple[int, int], tuple[int, ...]] = {}  # client, block → versions streamed ahead
        self._cohort = cache(self._draw_cohort)

    def itinerary(self) -> Itinerary:
        news = []
        for t in range(self._num_rounds):
            self._commit_through(t - 1 - self._delay)
            self._history.append(self._next_block())
            news.append({client_id: self._news_for(client_id) for client_id in self._cohort(t)})
        self._commit_through(self._num_rounds - 1)
        every = self._config.checkpoint.every_rounds
        return Itinerary(
            tuple(self._history),
            tuple(news),
            tuple(self._streams),
            {client_id: self._news_for(client_id) for client_id in self._held},
            frozenset(range(every, self._num_rounds, every) if every else ()),
        )

    def _commit_through(self, last: int) -> None:
        for t in range(len(self._streams), last + 1):
            b, needed_in = self._history[t], t + 1 + self._delay
            wanted = self._cohort(needed_in) if needed_in < self._num_rounds else tuple(self._held)
            streaming = encoding_of(self._config).chunk_bytes is not None
            before = {i: (self._held[i][b], *self._ahead.get((i, b), ()))[-1] for i in wanted}
            self._streams.append(tuple(i for i in wanted if streaming and before[i] == self._versions[b]))
            earlier, self._ahead = self._ahead, {key: ahead for key, ahead in self._ahead.items() if key[1] != b}
            self._ahead |= {(i, b): (*earlier.get((i, b), ()), t) for i in self._streams[-1]}
            self._before[b] = self._versions[b]
            self._versions = (*self._versions[:b], t, *self._versions[b + 1 :])

    def _news_for(self, client_id: int) -> News:
        held, self._held[client_id] = self._held[client_id], self._versions
        if held is self._versions:
            return ()
        news: list[tuple[int, Literal["streamed", "fresh", "missed"]]] = []
        for b in range(self._num_blocks):
            if held[b] < self._versions[b]:
                ahead = self._ahead.pop((client_id, b), ())
                if ahead and ahead[-1] == self._versions[b]:
                    news += [(b, "streamed")] * len(ahead)
                else:
                    news.append((b, "fresh" if held[b] == self._before[b] else "missed"))
        return tuple(news)

    def _next_block(self) -> int:
        equal = [inf if version == NEVER else 1.0 for version in self._versions]
        places = {"num_blocks": self._num_blocks, "delay": self._delay, "seed": self._config.seed}
        return next_block(self._config.schedule, self._history, squared_delta=equal, **places)

    def _draw_cohort(self, round_index: int) -> tuple[int, ...]:
        federation = self._config.federation
        num_clients, participation = federation.num_clients, federation.participation
        drawn = cohort(round_index, num_clients=num_clients, participation=participation, seed=self._config.seed)
        able = [client_id for client_id in range(num_clients) if client_id not in federation.excluded_clients]
        chosen = [client_id for client_id in drawn if client_id in able]
        stand_ins = [client_id for client_id in able if client_id not in chosen]
        return tuple(sorted(chosen + stand_ins[: max(0, federation.min_updates - len(chosen))]))
