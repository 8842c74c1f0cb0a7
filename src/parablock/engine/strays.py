"""Updates that no round waits for: late ones, repetitions, and those that nobody asked for."""

from __future__ import annotations

from collections import Counter

from parablock.engine.participation import Participation
from parablock.engine.refusals import Refusal, Refusals
from parablock.engine.releasing import Releasing
from parablock.engine.round_fold import RoundFold
from parablock.wire.messages import Update

MAX_USELESS = 16
"""Messages of no use that a round takes from a client, beside those of updates that came too late."""

MAX_JOINS = 4
"""Processes of a client that may join, one after the other, while a round waits for it."""


class Strays:
    """Counts each stray update once, with its last chunk, and knows who sends nothing else.

    Args:
        participation: Learns that a late client has answered.
        refusals: Counts strays.
        releasing: Counts what strays reveal.
        committed_at_start: The last round that was committed when the server began. Clients send updates of such
            rounds again, because they cannot know that these have counted.
        most_late: The messages of all updates that an honest client may still send in vain, since rounds have gone
            on without it.

    Attributes:
        counted: Round → the clients whose updates counted.
    """

    def __init__(
        self,
        participation: Participation,
        refusals: Refusals,
        releasing: Releasing,
        committed_at_start: int,
        most_late: int,
    ) -> None:
        self._most_useless = MAX_USELESS + most_late
        self._participation, self._refusals, self._releasing = participation, refusals, releasing
        self._committed_at_start = committed_at_start
        self.counted: dict[int, tuple[int, ...]] = {}
        self._round, self._before, self._given_up = -1, Counter[int](), set[int]()

    def nuisance(self, fold: RoundFold, fewest: int) -> int | None:
        """Return a client that the round waits for in vain, and has enough others to go on without it.

        It sends too much of no use, or joins again and again. From then on one of either is too much, until a whole
        update of it has come.
        """
        useless = self._refusals.useless
        if fold.round_index != self._round:
            known = {client_id: useless[client_id] - self._most_useless for client_id in self._given_up}
            self._round, self._before = fold.round_index, Counter({**useless, **known})
        if len(fold.expected) <= fewest:
            return None
        found = next((i for i in fold.missing if useless[i] - self._before[i] > self._most_useless), None)
        if found is not None:
            self._given_up.add(found)
        return found

    def delivered(self, client_id: int, round_index: int, now_s: float) -> None:
        """Note a whole update, in time or late: its client is no nuisance any more."""
        self._participation.delivered(client_id, round_index, now_s)
        self._given_up.discard(client_id)

    def joins(self, client_id: int, now_s: float) -> None:
        """Note that a client is back, by a process that joins in place of an earlier one."""
        self._participation.is_back(client_id, now_s)
        self._refusals.useless[client_id] += self._most_useless // MAX_JOINS + 1

    def skip(self, client_id: int) -> None:
        """Count a message that a client skips a round which does not expect it."""
        self._refusals.useless[client_id] += 1

    def take(self, client_id: int, update: Update, fold: RoundFold | None, now_s: float) -> None:
        """Count an update that the fold of its round does not expect; `fold` is None where there is none."""
        t = update.round_index
        self._refusals.useless[client_id] += 1
        if update.chunk_index != update.num_chunks - 1 or 0 <= t <= self._committed_at_start:
            return
        if not self._participation.was_asked(client_id, t) or update.client_id != client_id:
            unasked = Refusal("unasked", f"an update of round {t + 1}, which it was not asked for")
            self._refusals.count(client_id, unasked)
            return
        self.delivered(client_id, t, now_s)
        self._releasing.count_late(client_id, update)
        if client_id in self.counted.get(t, ()):
            self._refusals.count(client_id, Refusal("duplicate", f"the update of round {t + 1} again"))
        elif fold is None or fold.out.get(client_id, Refusal("late", "")).reason in ("late", "silent"):
            late = Refusal("late", f"its update of round {t + 1} after the round had ended")
            self._refusals.count(client_id, late)
