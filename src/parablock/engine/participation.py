"""Participation: the clients that a round asks, the answers that they owe, and the deadline of a round.

A client is asked while it owes at most d answers. A client that has left or is far behind is asked no more, so no
round waits for it. When it answers or joins again, the next round asks it, and sends all commits that it lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any

from parablock.engine.plans import ServerPlan


class Participation:
    """The server's knowledge of its clients.

    Args:
        plan: The server's settings.
        memory: What `memory` returned before an interruption, with the seconds of each client's last answer.
        absent: The clients that have not joined yet.
        is_masked: Whether masks are made for the drawn clients, so that no other can stand in for them.
    """

    def __init__(
        self,
        plan: ServerPlan,
        memory: Mapping[str, Any],
        absent: Collection[int] = (),
        *,
        is_masked: bool = False,
    ) -> None:
        self._plan, self._is_masked = plan, is_masked
        self._owes: dict[int, set[int]] = {client_id: set() for client_id in range(plan.num_clients)}
        self._left = set(absent)
        answer_s = memory.get("answer_s", {})
        self._answer_s = {int(client_id): float(seconds) for client_id, seconds in answer_s.items()}
        self._asked: dict[int, tuple[int, ...]] = {}
        self._began_s: dict[int, float] = {}
        self._heard_s: dict[int, float] = {}

    def memory(self, first_open_round: int) -> dict[str, Any]:
        """Return the plain values that have to survive a restart."""
        asked = {t: list(clients) for t, clients in self._asked.items() if t >= first_open_round}
        return {"answer_s": dict(self._answer_s), "asked": asked}

    def candidates(self, drawn: Sequence[int]) -> tuple[int, ...]:
        """Return the drawn clients that can be asked, with stand-ins if they are fewer than `min_updates`."""
        able = [client_id for client_id in self._owes if not self.is_absent(client_id)]
        chosen = [client_id for client_id in drawn if client_id in able]
        stand_ins = [client_id for client_id in able if client_id not in chosen and not self._is_masked]
        return tuple(sorted(chosen + stand_ins[: max(0, self._plan.min_updates - len(chosen))]))

    @property
    def num_present(self) -> int:
        """The number of clients that can be asked."""
        return sum(not self.is_absent(client_id) for client_id in self._owes)

    def was_asked(self, client_id: int, round_index: int) -> bool:
        """Return whether a round asked a client."""
        return client_id in self._asked.get(round_index, ())

    def asked_in(self, round_index: int) -> tuple[int, ...]:
        """Return the clients that a round asked."""
        return self._asked[round_index]

    def ask(self, round_index: int, clients: Sequence[int], now_s: float) -> None:
        """Note that a round asks these clients."""
        self._asked[round_index], self._began_s[round_index] = tuple(clients), now_s
        for client_id in clients:
            self._owes[client_id].add(round_index)

    def delivered(self, client_id: int, round_index: int, now_s: float) -> None:
        """Note a whole update, in time or late."""
        if round_index in self._owes[client_id]:
            self._answer_s[client_id] = now_s - self._free_s(client_id, round_index)
        self.answered(client_id, round_index, now_s)

    def answered(self, client_id: int, round_index: int, now_s: float) -> None:
        """Note an answer of any kind; answers come in order, so it settles all earlier ones."""
        self._heard_s[client_id] = now_s
        self._owes[client_id] = {t for t in self._owes[client_id] if t > round_index}

    def is_back(self, client_id: int, now_s: float) -> None:
        """Note that a client takes part and owes nothing, because it has joined, or restarted."""
        self._heard_s[client_id] = now_s
        self._owes[client_id] = set()
        self._left.discard(client_id)

    def leaves(self, client_id: int) -> None:
        """Note that a client takes part no more, until it joins."""
        self._left.add(client_id)

    def owes(self, client_id: int, round_index: int) -> None:
        """Note that a client is asked once more."""
        self._owes[client_id].add(round_index)

    def is_absent(self, client_id: int) -> bool:
        """Return whether a client has left, or owes so many answers that it is not asked."""
        return client_id in self._left or len(self._owes[client_id]) > self._plan.delay

    def deadline_s(self, round_index: int, missing: Sequence[int]) -> float | None:
        """Return when a round stops waiting for the missing clients; None without a deadline, or before any answer.

        A client has `deadline_factor` times the median answer time, from when the round asked it or it had answered
        the round before.
        """
        if self._plan.deadline_factor is None or not self._answer_s:
            return None
        allowed_s = self._plan.deadline_factor * median(self._answer_s.values())
        return max(self._free_s(client_id, round_index) for client_id in missing) + allowed_s

    def _free_s(self, client_id: int, round_index: int) -> float:
        return max(self._began_s[round_index], self._heard_s.get(client_id, 0.0))
