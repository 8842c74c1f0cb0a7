"""Who takes part: who is asked in a round, who still owes an answer, and how long the others are waited for.

A client is asked while it owes no more than d answers. One that is gone or far behind is asked no more, so
no round waits for it; as soon as it answers, or joins again, it is asked in the next round, with all commits
that it lacks. Where nobody is late everybody is asked always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


class Participation:
    """The server's knowledge of its clients.

    Args:
        num_clients: How many there are.
        delay: d.
        min_updates: Fewest updates that a commit needs.
        deadline_factor: A round waits so many times the median answer time; None: for all.
        answer_s: For each client the seconds of its last answer, from before an interruption.
    """

    def __init__(
        self,
        num_clients: int,
        delay: int,
        *,
        min_updates: int,
        deadline_factor: float | None,
        answer_s: Mapping[Any, float],
    ) -> None:
        self._delay, self._deadline_factor, self._min_updates = delay, deadline_factor, min_updates
        self._owes: dict[int, set[int]] = {client_id: set() for client_id in range(num_clients)}
        self._answer_s = {int(client_id): float(seconds) for client_id, seconds in answer_s.items()}
        self._asked: dict[int, tuple[int, ...]] = {}
        self._began_s: dict[int, float] = {}
        self._heard_s: dict[int, float] = {}

    def memory(self, first_open_round: int) -> dict[str, Any]:
        """Give what has to survive a restart, as plain values."""
        asked = {t: list(clients) for t, clients in self._asked.items() if t >= first_open_round}
        return {"answer_s": dict(self._answer_s), "asked": asked}

    def candidates(self, drawn: Sequence[int]) -> tuple[int, ...]:
        """Give who of the drawn cohort can be asked; others stand in where fewer than `min_updates` can."""
        able = [client_id for client_id, owed in self._owes.items() if len(owed) <= self._delay]
        chosen = [client_id for client_id in drawn if client_id in able]
        stand_ins = [client_id for client_id in able if client_id not in chosen]
        return tuple(sorted(chosen + stand_ins[: max(0, self._min_updates - len(chosen))]))

    def was_asked(self, client_id: int, round_index: int) -> bool:
        """Tell whether a client was asked for a round."""
        return client_id in self._asked.get(round_index, ())

    def asked_in(self, round_index: int) -> tuple[int, ...]:
        """Give who was asked."""
        return self._asked[round_index]

    def ask(self, round_index: int, clients: Sequence[int], now_s: float) -> None:
        """Note who is asked."""
        self._asked[round_index], self._began_s[round_index] = tuple(clients), now_s
        for client_id in clients:
            self._owes[client_id].add(round_index)

    def delivered(self, client_id: int, round_index: int, now_s: float) -> None:
        """Note a whole update, in time or late."""
        if round_index in self._owes[client_id]:
            self._answer_s[client_id] = now_s - self._free_s(client_id, round_index)
        self.answered(client_id, round_index, now_s)

    def answered(self, client_id: int, round_index: int, now_s: float) -> None:
        """Note an answer of any kind; answers come in order, so it settles all that were owed before."""
        self._heard_s[client_id] = now_s
        self._owes[client_id] = {t for t in self._owes[client_id] if t > round_index}

    def is_back(self, client_id: int, now_s: float) -> None:
        """Note that a client owes nothing, because it has begun anew."""
        self._heard_s[client_id] = now_s
        self._owes[client_id] = set()

    def owes(self, client_id: int, round_index: int) -> None:
        """Note that a client is asked once more."""
        self._owes[client_id].add(round_index)

    def is_absent(self, client_id: int) -> bool:
        """Tell whether a client owes so much that it is not asked."""
        return len(self._owes[client_id]) > self._delay

    def deadline_s(self, round_index: int, missing: Sequence[int]) -> float | None:
        """Give when the round stops waiting for those who are missing; None where that is not known, or never.

        Each has so many times the median answer time from when it could begin: when it was asked, or had
        answered the round before.
        """
        if self._deadline_factor is None or not self._answer_s:
            return None
        allowed_s = self._deadline_factor * median(self._answer_s.values())
        return max(self._free_s(client_id, round_index) for client_id in missing) + allowed_s

    def _free_s(self, client_id: int, round_index: int) -> float:
        return max(self._began_s[round_index], self._heard_s.get(client_id, 0.0))
