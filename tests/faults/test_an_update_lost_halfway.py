"""An update that is lost with its site after its first part has left: it counts, and so does one after it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import remote_runs
from engines import server_plan
from parablock.clock import RealClock
from parablock.engine.client import Client
from parablock.engine.releasing import Releasing
from parablock.engine.remote import site_client
from parablock.engine.remote.frames import HEAD, PART, PART_BYTES, Hello, Opening
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.engine.round_fold import RoundFold
from parablock.engine.update_form import Differences
from parablock.privacy.keystream import Keystream, derive
from parablock.privacy.protection import Protection
from parablock.storage.audit_log import AuditLog, verify
from parablock.storage.release_history import History
from parablock.storage.release_ledger import ASKED, RELEASE, ReleaseLedger
from parablock.storage.site_store import SiteStore
from parablock.trace import Trace
from parablock.wire import quantize
from parablock.wire.messages import Update, to_bytes
from parablock.wire.quantize import Encoding, pack


def noise_of(key: bytes, client_id: int) -> Protection:
    return Protection(1.0, 0.5, lambda t, content: Keystream(derive(key, client_id, t, content)).normals)


class Lost(Client):
    """Dies when the server has the first chunk of its update of round 4."""

    town: ClassVar[remote_runs.Town]

    def _send_again(self, updates: Iterable[tuple[int, int]]) -> None:
        updates, town = list(updates), self.town
        if (self.client_id, updates) != (1, [(4, 0)]) or town.deaths:
            super()._send_again(updates)
            return
        self._pipeline.send(self._sent[4][0], 4)
        while not town.taken[1, 4]:
            time.sleep(0.01)
        older = ReleaseLedger()
        for t in range(4):
            older.record(RELEASE, t, **town.releases[1].recorded(RELEASE, t)[0])
        town.releases[1], town.keys[1] = older, bytes(range(32))
        raise remote_runs.Died


@pytest.mark.parametrize("held", ["refused", "counted", "neither, the hole that was"])
def test_an_update_that_is_lost_with_its_site_after_its_first_chunk_is_not_undercounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
):
    """Client 1 comes back with a copy of its folder from before round 4: what it would send is another update."""
    newest, take, taken = SiteStore.newest, RoundFold.take, defaultdict[tuple[int, int], set[bytes]](set)

    def watched(fold: RoundFold, client_id: int, update: Update) -> Any:
        if update.chunk_index == 0:
            taken[client_id, fold.round_index].add(update.delta.raw.numpy().tobytes())
        return take(fold, client_id, update)

    monkeypatch.setattr(quantize, "CHUNK_PIECE", 2)  # three chunks of a toy's block
    monkeypatch.setattr(RoundFold, "take", watched)
    monkeypatch.setattr(site_client, "Client", Lost)
    monkeypatch.setattr(
        SiteStore,
        "newest",
        lambda store, sessions: (
            (None, []) if Lost.town.deaths and store.folder.name == "1" else newest(store, sessions)
        ),
    )
    if held != "refused":
        monkeypatch.setattr(RemoteTransport, "begins", lambda *_: None)
    if held.startswith("neither"):
        monkeypatch.setattr(Releasing, "forget", lambda _, fold, client_id: fold.forget(client_id))
    form = Differences(Encoding("float32", chunk_bytes=8))
    plan = replace(server_plan(3, 8, 1, form, min_updates=2), account="updates")
    keys = dict.fromkeys(range(3), bytes(32))
    Lost.town = town = remote_runs.Town(
        tmp_path, plan, [3, 1, 2], protection_of=lambda i: noise_of(keys[i], i), keeps_releases=True
    )
    town.taken, town.keys = taken, keys
    assert town.run().finished and town.deaths == 1
    counted = town.releases[-1].releases_by_client()
    released = Counter({i: sum(len(each) for (of, _), each in taken.items() if of == i) for i in range(3)})
    assert len(taken[1, 4]) == (1 if held == "refused" else 2)
    assert [len(town.refused), counted == released] == [held == "refused", not held.startswith("neither")]
    if held.startswith("neither"):
        assert counted[1] == released[1] - 1
    for client_id in (0, 2):  # and nothing differs where nothing was lost
        history = town.releases[-1].history_of(client_id)
        assert town.releases[client_id].compare(history) == ([], [])
        assert len(town.releases[client_id].compare(replace(history, sums="ff"))[1]) == 1


def test_half_a_message_is_on_the_disk_before_it_is_taken_and_a_later_process_learns_of_it(tmp_path: Path):
    """The server dies with half of an update in memory; another time the site does, and asks for the session."""

    def server() -> tuple[RemoteTransport, ReleaseLedger]:
        ledger = ReleaseLedger(AuditLog(tmp_path / "audit.jsonl"))
        transport = RemoteTransport(Opening("run", "s", "", ""), 2, 9, 1 << 30, Trace(RealClock()), releases=ledger)
        transport.begin()
        return transport, ledger

    def joins(transport: RemoteTransport, name: str) -> tuple[Opening | None, Callable[[int, int], bool]]:
        reception, stream = transport.welcome(Hello(1, "s", name, 0, 0.0))
        if stream is None:
            return reception.opening, lambda *_: False
        connection, deliver = stream.attach(0), partial(transport.deliver, 1, stream)

        def sends(t: int, number: int) -> bool:
            update = Update(t, 0, 1, 1, -1, None, 1, 0.0, 0, 1, pack(torch.ones(PART_BYTES // 2), "float32"))
            message = to_bytes(update)
            head = HEAD.pack(PART, number, t, len(message), 0.0)
            frame, begins = head + message[:PART_BYTES], partial(transport.begins, 1, stream)
            return stream.take(frame, connection, deliver, begins)

        return None, sends

    def asks(transport: RemoteTransport) -> History:
        return transport.welcome(Hello(1, "", "", 0, 0.0))[0].opening.history

    transport, ledger = server()
    ledger.record(ASKED, 3, clients=(0, 1))
    assert asks(transport).last == -1
    _, sends = joins(transport, "first")
    assert sends(3, 0)
    assert [entry.facts for entry in verify(tmp_path / "audit.jsonl").entries][1:] == [{"round": 3, "clients": [1]}]
    assert (ledger.releases_by_client(), asks(transport).last) == ({1: 1}, 3)
    after, ledger = server()
    assert (ledger.releases_by_client(), asks(after).last) == ({0: 1, 1: 1}, 3), "0 may have sent something"
    _, sends = joins(after, "second")
    assert sends(5, 0) and asks(after).last == 3, "what was not asked for is no line of the ledger"

    third, ledger = server()
    ledger.record(ASKED, 6, clients=(1,))
    _, sends = joins(third, "third")
    assert asks(third).last == 3
    assert sends(6, 0), "the last of an old process comes when the new one has asked"
    opening, _ = joins(third, "fourth")
    assert opening is not None and opening.history.last == 6, "so the new one is told again"
    opening, sends_too = joins(third, "fourth")
    assert opening is None
    ledger.record(ASKED, 7, clients=(1,))
    assert not sends(7, 1) and asks(third).last == 6, "nothing more of the old one is taken"
    assert sends_too(7, 0) and asks(third).last == 7
