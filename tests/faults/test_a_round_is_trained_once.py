"""A server that asks twice gets one update under one noise, and one sum of enough updates under the masks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from masked_wires import MaskedWires
from message_sequences import SIZE, Dictated, Over, Walks, masked_update
from parablock.algorithm.parablock import initial_client
from parablock.clock import RealClock
from parablock.engine.client import Client
from parablock.engine.plans import ClientPlan, ClientStart
from parablock.engine.update_form import Differences
from parablock.privacy.keystream import Keystream, derive
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.protection import Protection
from parablock.storage.release_ledger import ReleaseLedger
from parablock.trace import Trace
from parablock.wire.messages import NewValue, RoundStart, Skip, Update, from_bytes, to_bytes
from parablock.wire.quantize import Encoding, pack
from parablock.wire.sealing import Reveal, Revealed, pack_bytes
from parablock.wire.transport import Parcel

KEY = bytes(range(32))
ZEROS = NewValue(0, 0, 1.0, "value", pack(torch.zeros(SIZE), "float32"))
BOUND = 100.0
AHEAD = 9


def by_content(t: int, content: str):
    return Keystream(derive(KEY, t, content)).normals


def by_round_alone(t: int, content: str):
    return Keystream(derive(KEY, t)).normals


def told(
    said: Sequence[RoundStart], normals=by_content, ledger: ReleaseLedger | None = None
) -> tuple[list[object], list[str]]:
    """Return what a client with local noise sends, and of what it warns."""
    box, warned = Dictated([to_bytes(message) for message in said]), list[str]()
    protection = Protection(BOUND, 4.0, normals)
    plan = ClientPlan("none", Differences(Encoding("float32")), AHEAD, lambda _: protection)
    start = ClientStart(initial_client([torch.ones(SIZE), torch.ones(SIZE)]), releases=ledger)
    client = Client(0, plan, Walks(0), box, Trace(RealClock()), start=start, warn=warned.append)
    with pytest.raises(Over):
        client.run()
    return [from_bytes(raw) for raw in box.sent], warned


def start(t: int, *news: NewValue) -> RoundStart:
    return RoundStart(t, 0, 2, 0, -1, news)


def test_a_round_that_is_announced_twice_is_trained_once(monkeypatch: pytest.MonkeyPatch):
    once, _ = told([start(0)])
    twice, warned = told([start(0), start(0, ZEROS)])
    assert [torch.equal(a.delta.values, b.delta.values) for a, b in zip(once, twice, strict=True)] == [True]
    assert warned == ["client 0 refuses what the server sent: round 1, after round 1"]
    # the hole that was: without the check and with noise of the round alone, the difference has no noise
    monkeypatch.setattr(Client, "_unfit", lambda *_: "")
    one, other = (update.delta.values for update in told([start(0), start(0, ZEROS)], by_round_alone)[0])
    assert float((one - other).abs().max()) < 4 < float(one.abs().max())
    one, other = (update.delta.values for update in told([start(0), start(0, ZEROS)])[0])
    assert float((one - other).abs().max()) > 100, "noise by content covers each of them, even so"


def test_an_older_round_than_the_newest_is_not_trained():
    sent, warned = told([start(1), start(0), start(2)])
    assert [update.round_index for update in sent] == [1, 2]
    assert "round 1, after round 2" in warned[0]


def test_more_rounds_than_may_be_open_are_not_trained():
    """A server that commits nothing would let a client keep every update that it has made."""
    sent, warned = told([start(t) for t in range(20)])
    assert [update.round_index for update in sent] == [*range(AHEAD)]
    assert f"round {AHEAD + 1}, where 0 are committed, and {AHEAD} may be open" in warned[0]


def test_after_a_crash_a_client_sends_the_same_bytes_or_gives_the_round_up():
    ledger = ReleaseLedger()
    (first,), _ = told([start(0)], ledger=ledger)
    (again,), _ = told([start(0)], ledger=ledger)
    assert torch.equal(first.delta.values, again.delta.values)
    (other,), warned = told([start(0, ZEROS)], ledger=ledger)
    assert other == Skip(0)
    assert "another update of it has been released before" in warned[0]
    (other,), _ = told([start(0, ZEROS)], ledger=ReleaseLedger())
    assert isinstance(other, Update), "it was the ledger"
    (other,), _ = told([start(0, ZEROS)], ledger=replaced(ledger))
    assert isinstance(other, Update), "where nothing is hidden a server may go back"


def replaced(ledger: ReleaseLedger) -> ReleaseLedger:
    loose = ReleaseLedger(is_strict=False)
    for facts in ledger.recorded("release", 0):
        loose.record("release", 0, **facts)
    return loose


def masked(num_clients: int = 5) -> MaskedWires:
    wires = MaskedWires(num_clients, {0: tuple(range(num_clients))})
    wires.collector.send(0, Parcel(to_bytes(Skip(0)), 0))
    for client_id in range(num_clients):
        wires.upload(client_id, masked_update(client_id, 0))
    return wires


def test_a_list_of_duplicates_is_no_set_of_enough_clients(monkeypatch: pytest.MonkeyPatch):
    wires = masked()
    five_times_one = Reveal(0, (0,) * 5, ((),) * 5, (0,) * 5, pack_bytes(b""))
    assert wires.couriers[0].incoming(Parcel(to_bytes(five_times_one), 0)) == []
    assert "not in ascending order, each once" in wires.told[0]
    (answer,) = wires.couriers[0]._answer_reveal(five_times_one)  # nor if it could be decoded
    assert from_bytes(answer.message).shares.num_elements == 0
    monkeypatch.setattr(MaskedClient, "_forbidden", lambda *_: "")
    (answer,) = wires.couriers[0]._answer_reveal(five_times_one)
    revealed = from_bytes(answer.message)
    assert isinstance(revealed, Revealed) and revealed.shares.num_elements == 5 * 33, "the hole that was"


def test_a_mask_covers_a_round_once():
    wires = masked()
    *_, again = wires.couriers[0].outgoing(Parcel(masked_update(0, 0), 0))
    assert isinstance(from_bytes(again.message), Update), "the same words are the same bytes"
    (other,) = wires.couriers[0].outgoing(Parcel(masked_update(0, 0, 1), 0))
    assert from_bytes(other.message) == Skip(0)
    plain, fresh = (from_bytes(masked_update(0, 0, number)).delta.values for number in (0, 1))
    hidden = from_bytes(again.message).delta.values
    assert not torch.equal(hidden, plain)
    wires.couriers[0]._masked.clear()  # the hole that was: two updates under one mask differ by themselves alone
    *_, other = wires.couriers[0].outgoing(Parcel(masked_update(0, 0, 1), 0))
    assert torch.equal(from_bytes(other.message).delta.values - hidden, fresh - plain)


def test_letters_are_sealed_once():
    wires = masked()
    roster = next(raw for raw in wires.sent if b'"Roster"' in raw)
    assert wires.couriers[0].incoming(Parcel(roster, 0)) == []
    assert "a Roster out of its turn" in wires.told[0]
