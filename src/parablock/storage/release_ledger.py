"""The ledger of releases: what a client or the server has let out of its hands, on the disk before the bytes leave.

| kind | by | a line says |
|---|---|---|
| release | a client | the hash of its update of a round, and whether it leaves masked |
| reveal | a client | the set of clients for whose masked sum of a round it gives shares |
| lost | a client | the last round of which it may have released something that its ledger has lost |
| set | the server | the same set, before it asks for shares |
| shares | the server | the clients that have given shares for a set |
| asked | the server | the clients whose noisy updates of a round may come |
| begun | the server | a client whose noisy update of a round begins to come, before more of it is taken |
| account | the server | the clients of an update or a noisy mean that it has got or gives away, and its hash |

A client has one update in a round, and one set: after a crash it sends these bytes again, or none. What an account
counts is an update or a mean of its own; the same bytes once more are none. The hash of a `whole` update is the one
in the client's own ledger.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from hashlib import sha256
from threading import Lock
from typing import Any

from parablock.errors import CheckpointError
from parablock.storage.audit_log import START, AuditLog
from parablock.storage.release_history import History, HistoryIndex
from parablock.wire.quantize import Vector

RELEASE, REVEAL, LOST, SET, SHARES = "release", "reveal", "lost", "set", "shares"
ASKED, BEGUN, ACCOUNT = "asked", "begun", "account"

_RECORDING = Lock()
"""Several threads record and count; the ledgers of one process have one log, so that one lock is enough."""


class ReleaseLedger:
    """What one client, or the server, has released in a run.

    Args:
        log: The log on its disk; None: nothing outlives this object.
        run: Tells runs of one log apart, and clients of one process; empty: the log has no other.
        is_strict: Whether a round has one update only; where updates are neither noisy nor masked, a server that
            goes back to a checkpoint may get another one.
        is_masked: Whether updates leave masked.
        lost_through: The last round of which a lost ledger may have held something: of that round and those before,
            a client releases nothing that is not on record; −1: none was lost. What the log says counts too.

    Raises:
        StorageError: The log has been damaged.
    """

    def __init__(
        self,
        log: AuditLog | None = None,
        run: str = "",
        *,
        is_strict: bool = True,
        is_masked: bool = False,
        lost_through: int = -1,
    ) -> None:
        self._log, self._run, self.is_strict = log, {"run": run} if run else {}, is_strict
        self.is_masked, self.lost_through = is_masked, lost_through
        self._of: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        self._histories = defaultdict[int, HistoryIndex](HistoryIndex)
        self._last_asked: dict[int, int] = {}
        self._may_have: dict[int, set[int]] = defaultdict(set)
        """Round → clients that have released a part of an update of it at least, or may have."""
        for entry in log.entries() if log else ():
            facts = dict(entry.facts)
            if entry.kind == LOST and facts["run"] == run:
                self.lost_through = max(self.lost_through, facts["through"])
            if facts.pop("run", "") == run and isinstance(t := facts.pop("round", None), int):
                self._note(entry.kind, t, facts)
                self._may_have[t].update(facts["clients"] if entry.kind == ASKED else ())

    def record(self, kind: str, round_index: int, **facts: Any) -> None:
        """Write what is released to the disk, unless it is there; a tuple becomes a list."""
        facts = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}
        if kind == RELEASE and self.is_masked:
            facts["masked"] = True
        with _RECORDING:
            if facts in self._of.get((kind, round_index), ()):
                return
            if self._log is not None:
                self._log.append(kind, **self._run, round=round_index, **facts)
            self._note(kind, round_index, facts)

    def begins(self, client_id: int, round_index: int) -> None:
        """Record that a noisy update of a client begins to come, if the round asked for it."""
        if any(client_id in facts["clients"] for facts in self.recorded(ASKED, round_index)):
            self.record(BEGUN, round_index, clients=(client_id,))

    def _note(self, kind: str, round_index: int, facts: dict[str, Any]) -> None:
        self._of[kind, round_index].append(facts)
        if kind == BEGUN:
            self._may_have[round_index].update(facts["clients"])
        for client_id in facts["clients"] if kind in (SET, SHARES, ASKED, BEGUN, ACCOUNT) else ():
            if kind == ASKED:
                self._last_asked[client_id] = max(round_index, self._last_asked.get(client_id, -1))
            elif kind == SHARES:
                self._histories[client_id].add_line(round_index, {"clients": facts["of"]})
            else:
                self._histories[client_id].add_round(round_index)
            if facts.get("whole"):
                self._histories[client_id].add_line(round_index, {"sha256": facts["sha256"]})

    def history_of(self, client_id: int) -> History:
        """Return what is on record of a client."""
        with _RECORDING:
            return self._histories[client_id].history

    def last_asked(self, client_id: int) -> int:
        """Return the last round whose noisy update may have come from a client; −1: there is none."""
        return self._last_asked.get(client_id, -1)

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

    def compare(self, history: History) -> tuple[list[int], list[tuple[int, int]]]:
        """Compare this client's ledger with what a server has on record; of rounds that are lost nothing.

        Return the rounds of which the server has something and this ledger has no update, and the spans of rounds,
        first and last, in which its lines are not those that the server knows. The hash of a masked update is none
        that it can know, whatever it says that this run is: an answer would tell it whether a guess is right.
        """
        updates, sums = (
            {t: facts[0] for (of, t), facts in self._of.items() if of == kind} for kind in (RELEASE, REVEAL)
        )
        known = {t: facts for t, facts in updates.items() if not facts.get("masked")} | sums
        lost = max(-1, self.lost_through)
        return history.lacking(updates, lost), history.differing(known, lost)

    @property
    def last_release(self) -> int:
        """The last round that this client has released something of, or may have; −1: there is none."""
        return max(self.lost_through, *(t for kind, t in self._of if kind == RELEASE), -1)

    def has_account_of(self, client_id: int, round_index: int) -> bool:
        """Return whether an account has an update of a client in a round."""
        return any(client_id in facts["clients"] for facts in self.recorded(ACCOUNT, round_index))

    def releases_by_client(self, through: int | None = None, counts: str = ACCOUNT) -> Counter[int]:
        """Return how many different updates, or means or sums with one of them, each client has in an account.

        An update of which a part has come, or that was asked for before a crash, and of which no more is known, is
        one.

        Args:
            through: The last round that counts; None: all rounds.
            counts: The kind of lines that count: ACCOUNT, or SET where masked sums are what is released.
        """
        counted = Counter[int]()
        with _RECORDING:
            for (kind, t), entries in self._of.items():
                if kind == counts and (through is None or t <= through):
                    counted.update(client_id for facts in entries for client_id in facts["clients"])
            for t, clients in self._may_have.items():
                if through is None or t <= through:
                    counted.update(client_id for client_id in clients if not self.has_account_of(client_id, t))
        return counted

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


class RunningHash:
    """The `fingerprint` of an update whose chunks come one after another.

    Attributes:
        num_chunks: How many it has; a chunk that came out of its turn, and all after it, are not in it.
    """

    def __init__(self) -> None:
        self._hash, self.num_chunks = sha256(), 0

    def take(self, index: int, chunk: Vector) -> None:
        """Take a chunk in, if it is the next one."""
        if index == self.num_chunks:
            self._hash.update(chunk.raw.numpy().data)
            self.num_chunks += 1

    @property
    def hex(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def fingerprint(vectors: Iterable[Vector]) -> str:
    """Return the SHA-256 of the payloads of an update."""
    hash_ = sha256()
    for vector in vectors:
        hash_.update(vector.raw.numpy().data)
    return hash_.hexdigest()
