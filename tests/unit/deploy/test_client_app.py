"""A site inside a Flower federation: what it answers, and that its own words stay at home."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from parablock.deploy import client_app
from parablock.deploy.client_app import join, server_host, take_part_until_over
from parablock.deploy.site import load_site
from parablock.deploy.site_service import only_process
from parablock.engine.flower.joining import FAILED, OVER, REFUSED, SIMULATED, UNREACHABLE, Invitation
from parablock.engine.flower.run_certificate import make_run_certificate
from parablock.engine.remote.frames import Opening, Reception
from parablock.engine.remote.listener import Listener
from parablock.engine.remote.site_channel import Refused, SessionOver
from parablock.errors import ConfigError, DataError, StallError

OPENING = Opening("run", "session", "", "")
OPEN, ENDED = Reception(0, False, 0.0, OPENING), Reception(0, False, 0.0, OPENING, is_over=True)


class Calls:
    """Answers calls of a site, one after the other, as a server would."""

    def __init__(self, *answers: Reception | Exception) -> None:
        self.answers, self.said = iter(answers), list[str]()
        self.say = self.said.append

    def ask(self) -> Reception:
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def parts(*ends: Exception | None) -> Callable[..., None]:
    """Take part so many times, and end each as told."""
    left: Iterator[Exception | None] = iter(ends)

    def take_part(*_: object) -> None:
        if (end := next(left)) is not None:
            raise end

    return take_part


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_app, "PAUSE_S", 0.0)


@pytest.mark.parametrize(
    ("answers", "ends", "word"),
    [
        ([OPEN], [None], OVER),
        ([ENDED], [], OVER),
        ([OPEN, OPEN], [SessionOver(), None], OVER),
        ([OPEN, ENDED], [SessionOver()], OVER),
        ([ConnectionError("not ready"), OPEN], [None], OVER),
        ([Refused("stale")], [], REFUSED),
        ([OPEN], [Refused("removed")], REFUSED),
        ([OPEN], [StallError("no sign")], UNREACHABLE),
        ([ConnectionError("SSL_ERROR: CERTIFICATE_VERIFY_FAILED")], [], UNREACHABLE),
    ],
)
def test_a_site_takes_part_until_there_is_no_more_to_do(answers, ends, word):
    assert take_part_until_over(None, Calls(*answers), parts(*ends)) == word


def test_a_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_app, "CONNECT_S", -1.0)
    calls = Calls(ConnectionError("refused"))
    assert take_part_until_over(None, calls, parts()) == UNREACHABLE
    assert calls.said == ["waiting for the server: refused"]


def test_a_problem_of_the_site_is_no_end_of_the_session():
    with pytest.raises(DataError):
        take_part_until_over(None, Calls(OPEN), parts(DataError("no rows")))


def site_of(folder: Path) -> Path:
    path = folder / "site.yaml"
    site = {"client_id": 0, "state_dir": "state", "model": {"name_or_path": "/m"}, "data": {"train": ["/rows"]}}
    path.write_text(yaml.safe_dump(site))
    return path


def asked(node_config: dict[str, object], port: int = 1, certificate: str = "") -> str:
    return join(Invitation(port, certificate, "0" * 64, 1), SimpleNamespace(node_config=node_config))


def test_a_site_answers_with_a_word_and_says_the_rest_at_home(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "parablock")
    assert asked({}) == FAILED
    assert "does not say whose it is" in caplog.text
    assert asked({"site": str(tmp_path / "nowhere.yaml")}) == FAILED
    assert "nowhere.yaml" in caplog.text
    assert asked({"site": str(site_of(tmp_path))}) == FAILED
    assert "server-host" in caplog.text
    assert asked({"partition-id": 0, "num-partitions": 2}) == SIMULATED
    assert "clock: virtual" in caplog.text
    assert not (tmp_path / "state").exists()


def test_another_process_of_the_site_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = site_of(tmp_path)
    with only_process(load_site(path)):
        assert asked({"site": str(path), "server-host": "127.0.0.1"}) == FAILED
    assert "another process serves the site" in caplog.text


@pytest.mark.parametrize(("own", "lease_s"), [(3600.0, client_app.CONNECT_S), (5.0, 5.0)])
def test_a_trainer_outlives_a_server_that_is_dead_for_a_short_while_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: float, lease_s: float
):
    taken: list[float] = []
    monkeypatch.setattr(client_app, "take_part_until_over", lambda site, _: taken.append(site.lease_s) or OVER)
    path = site_of(tmp_path)
    path.write_text(f"{path.read_text()}lease_s: {own}\n")
    assert asked({"site": str(path), "server-host": "127.0.0.1"}) == OVER
    assert taken == [lease_s]


def test_a_mistake_of_ours_is_not_told_to_the_server(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture):
    def broken(*_: object) -> str:
        raise ZeroDivisionError("a row of the site")

    monkeypatch.setattr(client_app, "take_part_until_over", broken)
    assert asked({"site": str(site_of(tmp_path)), "server-host": "127.0.0.1"}) == FAILED
    assert "a row of the site" in caplog.text


def test_an_interrupt_of_flower_goes_through(tmp_path: Path, monkeypatch):
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(client_app, "take_part_until_over", interrupted)
    path = site_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        asked({"site": str(path), "server-host": "127.0.0.1"})
    with only_process(load_site(path)):
        pass


def test_a_stale_invitation_ends_before_anything_is_loaded(tmp_path: Path):
    def admit(_: object) -> int:
        from parablock.engine.remote.listener import NotAdmitted

        raise NotAdmitted("stale")

    credentials, certificate = make_run_certificate()
    listener = Listener("127.0.0.1:0", credentials, admit, num_clients=1, tell=lambda _: None)
    try:
        here = {"site": str(site_of(tmp_path)), "server-host": "127.0.0.1"}
        assert asked(here, listener.port, certificate) == REFUSED  # model and rows are nowhere
        _, other = make_run_certificate()
        assert asked(here, listener.port, other) == UNREACHABLE
    finally:
        listener.close()


def test_the_server_is_where_the_supernode_goes_unless_it_says_another_host():
    assert server_host({"server-host": "fl.example.org"}) == "fl.example.org"
    assert server_host({"server-host": "fl.example.org", "data-host": "data.example.org"}) == "data.example.org"
    with pytest.raises(ConfigError, match="server-host"):
        server_host({})
