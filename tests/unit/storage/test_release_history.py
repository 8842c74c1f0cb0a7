"""A site's ledger beside what a server has on record: one line in the middle that differs is found."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from parablock.engine.remote.frames import (
    MAX_WELCOME_BYTES,
    Opening,
    Reception,
    greeting_from_bytes,
    greeting_to_bytes,
)
from parablock.errors import CodecError
from parablock.storage.audit_log import AuditLog
from parablock.storage.release_history import MOST_ROUNDS, SPAN, History
from parablock.storage.release_ledger import ACCOUNT, BEGUN, RELEASE, REVEAL, SET, SHARES, ReleaseLedger


def both(rounds: list[int], *, is_masked: bool) -> tuple[ReleaseLedger, ReleaseLedger]:
    """The ledgers of a server and of client 1 after a run; the server's has its lines in another order."""
    server, site = ReleaseLedger(), ReleaseLedger(is_masked=is_masked)
    for t in rounds:
        site.record(RELEASE, t, sha256=f"update {t}")
        if is_masked:
            site.record(REVEAL, t, clients=(0, 1, t))
    for t in sorted(rounds, key=lambda t: t ^ 1):
        if is_masked:
            server.record(SET, t, clients=(0, 1, t))
            server.record(SHARES, t, clients=(1, t), of=(0, 1, t))
        else:
            server.record(ACCOUNT, t, clients=(1,), sha256=f"update {t}", whole=True)
    return server, site


def changed(ledger: ReleaseLedger, place: int, *, kind: str, to: dict | None) -> ReleaseLedger:
    """The same ledger with one line of a kind that is another one, or is not there."""
    other = ReleaseLedger(is_masked=ledger.is_masked, lost_through=ledger.lost_through)
    for (of, t), lines in ledger._of.items():
        if (of, t) != (kind, place):
            other.record(of, t, **lines[0])
        elif to is not None:
            other.record(of, t, **to)
    return other


@pytest.mark.parametrize("is_masked", [False, True], ids=["hashes of updates", "sets of sums"])
def test_one_line_that_differs_anywhere_is_found_and_two_equal_ledgers_agree(is_masked: bool):
    draw = Random(0)
    rounds = [t for t in range(150) if draw.random() < 0.6]
    server, site = both(rounds, is_masked=is_masked)
    history = server.history_of(1)
    assert site.compare(history) == ([], [])
    site.record(RELEASE, 1000, sha256="on its way when the server died")
    assert site.compare(history) == ([], [])
    kind, to = (REVEAL, {"clients": [0, 1]}) if is_masked else (RELEASE, {"sha256": "another"})
    for t in rounds:
        span = (t // SPAN * SPAN, t // SPAN * SPAN + SPAN - 1)
        other = changed(site, t, kind=kind, to=to)
        assert other.compare(history) == ([], [span]), f"round {t} is another one"
        assert other.last_release == site.last_release >= history.last, "by the last round nothing is found"
        lacking, differing = changed(site, t, kind=RELEASE, to=None).compare(history)
        assert lacking == [t] and (is_masked or differing == [span]), f"round {t} is not there"
    assert History() == server.history_of(2000), "who has nothing on record"


def test_a_line_that_is_known_and_not_there_differs_after_what_is_lost():
    """Of the span in which a loss ends, what a line says is not compared; that it is there is."""
    server, site = both([*range(40)], is_masked=True)
    lost = ReleaseLedger(is_masked=True, lost_through=3)
    for t in range(4, 40):
        lost.record(RELEASE, t, sha256=f"update {t}")
        lost.record(REVEAL, t, clients=(0, 1, t))
    history = server.history_of(1)
    assert site.compare(history) == lost.compare(history) == ([], [])
    assert changed(lost, 5, kind=REVEAL, to=None).compare(history) == ([], [(0, 31)])
    assert changed(lost, 5, kind=REVEAL, to={"clients": [0, 1]}).compare(history) == ([], []), "the price of sums"
    assert changed(site, 5, kind=REVEAL, to={"clients": [0, 1]}).compare(history) == ([], [(0, 31)])


def test_who_gives_shares_in_several_sessions_has_one_line_of_the_round(tmp_path: Path):
    """Who answers first differs from session to session, so that the server's log has several lines."""
    site = ReleaseLedger(is_masked=True)
    site.record(RELEASE, 0, sha256="the update")
    site.record(REVEAL, 0, clients=(0, 1, 2))
    for answered in ((0, 1), (0, 2), (0, 1, 2)):
        server = ReleaseLedger(AuditLog(tmp_path / "audit.jsonl"))
        server.record(SET, 0, clients=(0, 1, 2))
        server.record(SHARES, 0, clients=answered, of=(0, 1, 2))
        for ledger in (server, ReleaseLedger(AuditLog(tmp_path / "audit.jsonl"))):
            assert site.compare(ledger.history_of(0)) == ([], [])
            other = changed(site, 0, kind=REVEAL, to={"clients": [0, 1]})
            assert other.compare(ledger.history_of(0)) == ([], [(0, SPAN - 1)])
    assert len(server.recorded(SHARES, 0)) == 3


def test_of_what_is_lost_nothing_is_compared_and_of_all_else_it_is():
    server, site = both([*range(100)], is_masked=False)
    lost = ReleaseLedger(lost_through=40)
    for t in range(41, 100):
        lost.record(RELEASE, t, sha256=f"update {t}")
    history = server.history_of(1)
    assert lost.compare(history) == ([], [])
    assert changed(lost, 70, kind=RELEASE, to={"sha256": "another"}).compare(history)[1] == [(64, 95)]
    assert ReleaseLedger(lost_through=40).compare(history)[0] == [*range(41, 100)]
    assert ReleaseLedger(lost_through=10**18).compare(history) == ([], [])
    assert site.compare(History(last=1 << 62)) == ([1 << 62], []), "a lie takes no memory"


def test_what_has_only_begun_to_come_is_on_record_and_a_part_of_an_update_has_no_hash():
    server = ReleaseLedger()
    server.record(BEGUN, 3, clients=(1,))
    server.record(ACCOUNT, 4, clients=(1,), sha256="a part")
    site = ReleaseLedger()
    for t in (3, 4):
        assert site.compare(server.history_of(1))[0] == [*range(t, 5)]
        site.record(RELEASE, t, sha256="the whole")
    assert site.compare(server.history_of(1)) == ([], [])


def test_a_hundred_thousand_rounds_are_told_in_75_kb_and_more_rounds_than_are_compared_fit():
    server, site = both([*range(0, 100_000, 9)], is_masked=False)
    history = server.history_of(1)
    raw = greeting_to_bytes(Reception(0, False, 0.0, Opening("run", "s", "", "", history=history)))
    assert len(raw) < 76_000
    read = greeting_from_bytes(Reception, raw).opening
    assert read is not None and site.compare(read.history) == ([], [])
    other = changed(site, 54_315, kind=RELEASE, to={"sha256": "another"})
    assert other.compare(read.history) == ([], [(54_304, 54_335)])
    many = ReleaseLedger()
    for t in (0, MOST_ROUNDS - 1, MOST_ROUNDS, 3 * MOST_ROUNDS):
        many.record(ACCOUNT, t, clients=(1,), sha256="", whole=True)
    opening = Opening("run", "s", "", "", history=many.history_of(1))
    raw = greeting_to_bytes(Reception(0, False, 0.0, opening))
    assert len(raw) < MAX_WELCOME_BYTES / 2
    assert greeting_from_bytes(Reception, raw).opening == opening
    assert ReleaseLedger().compare(opening.history)[0] == [0, MOST_ROUNDS - 1, 3 * MOST_ROUNDS]


@pytest.mark.parametrize("wrong", [{"rounds": "0"}, {"known": "zz"}, {"sums": "00" * MOST_ROUNDS}, {"last": -2}])
def test_a_history_that_is_none_is_refused(wrong: dict):
    raw = greeting_to_bytes(Reception(0, False, 0.0, Opening("run", "s", "", "", history=History(**wrong))))
    with pytest.raises(CodecError, match="cannot be read"):
        greeting_from_bytes(Reception, raw)
