"""A hub out of reach is noticed at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from parablock.hub import is_reachable, use_cache_when_offline

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def address() -> Iterator[str]:
    """Somebody who accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    """The address of somebody who has just gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_who_accepts_connections_is_reachable_and_who_does_not_is_not(address: str, nobody: str):
    assert is_reachable(address)
    assert not is_reachable(nobody)
    assert not is_reachable("https://no-such-host.invalid")


def test_behind_a_proxy_the_proxy_decides(nobody: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert is_reachable(nobody)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not is_reachable(nobody)


def test_libraries_ask_a_hub_within_reach_and_nobody_otherwise(
    address: str, nobody: str, monkeypatch: pytest.MonkeyPatch
):
    asked_offline = []
    for endpoint in (address, nobody):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with use_cache_when_offline():
            asked_offline.append(constants.is_offline_mode())
        assert not constants.is_offline_mode()
    assert asked_offline == [False, True]


def test_an_error_on_the_way_leaves_the_libraries_as_they_were(nobody: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    with pytest.raises(OSError, match="not there"), use_cache_when_offline():
        raise OSError("not there")
    assert not constants.is_offline_mode()
