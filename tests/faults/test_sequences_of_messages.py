"""Messages of every protocol in any order, repeated, from others, for other rounds: nothing leaks, no run ends.

`benchmarks/survival.py sequences` plays many more.
"""

from __future__ import annotations

from collections import Counter

import pytest

from message_sequences import PLAYS
from parablock.engine.client import Client
from parablock.engine.downlink import Downlink
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.masked_server import MaskedServer
from parablock.seeding import generator_for

NUMBER = {"a masked client": 300, "the masked server": 60, "the server": 120, "a client": 200}


def played(end: str, number: int) -> Counter[str]:
    found = Counter[str]()
    for seed in range(number):
        found += PLAYS[end](generator_for(seed, f"sequence against {end}"))
    return found


def believing(server: MaskedServer, client_id: int, keys: object) -> str:
    server._advertised[client_id] = keys
    return ""


@pytest.mark.parametrize("end", PLAYS)
def test_no_sequence_of_messages_leaks_or_ends_a_run(end: str):
    assert played(end, NUMBER[end]) == {}


@pytest.mark.parametrize(
    ("end", "check", "found"),
    [
        ("a masked client", (MaskedClient, "_forbidden", lambda *_: ""), "leak: "),
        ("a client", (Client, "_unfit", lambda *_: ""), ""),
        ("the masked server", (MaskedServer, "_take_keys", believing), ""),
        ("the server", (Downlink, "misfit", lambda *_: ""), "foreign: "),
    ],
)
def test_without_its_check_an_end_leaks_or_ends_the_run(
    end: str, check: tuple[type, str, object], found: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(*check)
    assert any(problem.startswith(found) for problem in played(end, NUMBER[end]))
