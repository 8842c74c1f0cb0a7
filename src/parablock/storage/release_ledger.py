"""The ledger of releases: what a client or the server has let out of its hands, on the disk before the bytes leave.

| kind | by | a line says |
|---|---|---|
| release | a client | the hash of its update of a round |
| reveal | a client | the set of clients for whose masked sum of a round it gives shares |
| lost | a client | the last round of which it may have released something that its ledger has lost |
| set | the server | the same set, before it asks for shares |
| asked | the server | the clients whose noisy updates of a round may come |
| account | the server | the clients of an update or a noisy mean that it has got or gives away, and its hash |

A client has one update in a round, and one set: after a crash it sends these bytes again, or none. What an account
counts is an update or a mean of its own; the same bytes once more are none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any

from parablock.errors import CheckpointError
from parablock.storage.audit_log import START, AuditLog
from parablock.wire.quantize import Vector

RELEASE, REVEAL, LOST, SET, ASKED, ACCOUNT = "release", "reveal", "lost", "set", "asked", "account"


class ReleaseLedger:
    """What one client, or the server, has released in a run.

    Args:
        log: The log on its disk; None: nothing outlives this object.
        run: Tells runs of one log apart, and clients of one process; empty: the log has no other.
        is_strict: Whether a round has one update only; where updates are neither noisy nor masked, a server that
            goes back to a checkpoint may get another one.
        lost_through: The last round of which a lost ledger may have held something: of that round and those before,
            a client releases nothing that is not on record; −1: none was lost. What the log says counts too.

    Raises:
        StorageError: The log has been damaged.
    """

    def __init__(
        self, log: AuditLog | None = None, run: str = "", *, is_strict: bool = True, lost_through: int = -1
    ) -> None:
        self._log, self._run, self.is_strict = log, {"run": run} if run else {}, is_strict
        self.lost_through = lost_through
        self._of: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        for entry in log.entries() if log else ():
            facts = dict(entry.facts)
            if entry.kind == LOST and facts["run"] == run:
                self.lost_through = max(self.lost_through, facts["through"])
            if facts.pop("run", "") == run and isinstance(t := facts.pop("round", None), int):
                self._of[entry.kind, t].append(facts)
        self._before = {t: [i for facts in asked for i in facts["clients"]] for t, asked in self._asked()}

    def record(self, kind: str, round_index: int, **facts: Any) -> None:
        """Write what is released to the disk, unless it is there; a tuple becomes a list."""
        facts = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}
        if facts in self._of[kind, round_index]:
            return
        if self._log is not None:
            self._log.append(kind, **self._run, round=round_index, **facts)
        self._of[kind, round_index].append(facts)

    def recorded(self, kind: str, round_index: int) -> list[dict[str, Any]]:
        """Return what has been released of a kind in a round."""
        return list(self._of.get((kind, round_index), ()))

    def fix(self, kind: str, round_index: int, clients: tuple[int, ...]) -> tuple[int, ...]:
        """Record the set of a round, unless one is there; return the one that holds: of a lost round, none."""
        if not (before := self.recorded(kind, round_index)):
            if round_index <= self.lost_through:
                return ()
            self.record(kind, round_index, clients=clients)
            return clients
        return tuple(before[0]["clients"])

    def may_release(self, round_index: int, sha256: str) -> bool:
        """Return whether a client's update of a round is the first, or the one that was released before."""
        before = self.recorded(RELEASE, round_index)
        is_lost = round_index <= self.lost_through and not before
        return not self.is_strict or (not is_lost and all(facts["sha256"] == sha256 for facts in before))

    def last_round(self, *kinds: str, client_id: int | None = None) -> int:
        """Return the last round of the lines of these kinds, or of those with a client; −1: there is none."""
        rounds = (
            t
            for (kind, t), lines in list(self._of.items())  # other threads may record meanwhile
            if kind in kinds and any(client_id is None or client_id in facts["clients"] for facts in list(lines))
        )
        return max(rounds, default=-1)

    def has_account_of(self, client_id: int, round_index: int) -> bool:
        """Return whether an account has an update of a client in a round."""
        return any(client_id in facts["clients"] for facts in self.recorded(ACCOUNT, round_index))

    def releases_by_client(self, through: int | None = None, counts: str = ACCOUNT) -> Counter[int]:
        """Return how many different updates, or means or sums with one of them, each client has in an account.

        An update that was asked for before a crash, and of which nothing is known, is one.

        Args:
            through: The last round that counts; None: all rounds.
            counts: The kind of lines that count: ACCOUNT, or SET where masked sums are what is released.
        """
        counted = Counter[int]()
        for (kind, t), entries in self._of.items():
            if kind == counts and (through is None or t <= through):
                counted.update(client_id for facts in entries for client_id in facts["clients"])
        for t, asked in self._before.items():
            if through is None or t <= through:
                counted.update(client_id for client_id in set(asked) if not self.has_account_of(client_id, t))
        return counted

    def _asked(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        return ((t, entries) for (kind, t), entries in self._of.items() if kind == ASKED)

    @property
    def newest(self) -> str:
        """The hash of the newest line, for a checkpoint; empty without a log."""
        return self._log.newest if self._log else ""

    def check_holds(self, newest: str) -> None:
        """Raise a CheckpointError if the log lacks the line that was its newest when a checkpoint was written."""
        if self._log is not None and newest not in {"", START, *(entry.hash for entry in self._log.entries())}:
            raise CheckpointError(
                f"{self._log.path} does not hold what the checkpoint says was released before it",
                cause="The log was removed, or put back from an older copy.",
                remedy="Put back the log of the checkpoint; without it nothing says what was released.",
            )


def fingerprint(vectors: Iterable[Vector]) -> str:
    """Return the SHA-256 of the payloads of an update."""
    hash_ = sha256()
    for vector in vectors:
        hash_.update(vector.raw.numpy().data)
    return hash_.hexdigest()
