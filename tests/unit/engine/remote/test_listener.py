"""The door under attack: each stranger and each hostile site is refused, and the others' run goes on, bitwise."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest

from engines import QUIET, run_here, server_plan
from parablock import __version__
from parablock.algorithm.parablock import NEVER, same
from parablock.clock import RealClock
from parablock.deploy.authority import Credentials, load_credentials, make_all, revoke
from parablock.deploy.door import listen
from parablock.deploy.server_audit import audit_door
from parablock.engine import server
from parablock.engine.plans import Hooks
from parablock.engine.refusals import Refusal, Refusals
from parablock.engine.remote import listener as listener_module
from parablock.engine.remote import remote_transport
from parablock.engine.remote.frames import (
    BYE,
    CONFIRM,
    HEAD,
    MAX_HELLO_BYTES,
    NOTE,
    PART,
    PROTOCOL,
    Hello,
    Opening,
    Reception,
    greeting_from_bytes,
    greeting_to_bytes,
)
from parablock.engine.remote.grpc_options import METHOD
from parablock.engine.remote.listener import MOST_UNNAMED, Caller
from parablock.engine.remote.numbered_stream import NumberedStream
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.engine.update_form import Differences
from parablock.errors import CodecError, StorageError
from parablock.storage.audit_log import AuditLog
from parablock.storage.release_ledger import ASKED, BEGUN, ReleaseLedger
from parablock.trace import Trace
from parablock.training.trainer import Trained
from parablock.wire.codec import encode
from parablock.wire.messages import Join, Leave, Skip, to_bytes
from parablock.wire.quantize import Encoding
from parablock.wire.transport import MESSAGE_BYTES, Parcel
from remote_runs import BLOCKS, Town
from toy import ToyTrainer, initial

GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_all(folder / "ours", 4, ["localhost"])
    make_all(folder / "theirs", 1, ["localhost"])
    return folder


class House:
    """A server with its door, and no run behind it but a session."""

    def __init__(self, keys: Path, num_clients: int = 3) -> None:
        self.told = list[str]()
        self.clock = RealClock()
        self.trace = Trace(self.clock)
        self.opening = Opening("run", "session", "", "abc")
        self.listener = listen("127.0.0.1:0", keys, num_clients, self.told.append)
        self.transport = RemoteTransport(self.opening, num_clients, 9, 5 << 20, self.trace, tell=self.told.append)
        self.listener.open(self.transport)

    @property
    def num_threads(self) -> int:
        return len(self.listener._pool._threads)

    @property
    def refusals(self) -> list[str]:
        return [line for line in self.told if "refused" in line]

    def close(self) -> None:
        self.transport.leave()
        self.listener.close()


@pytest.fixture
def house(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(listener_module, "GRACE_S", 0.1)
    monkeypatch.setattr(remote_transport, "RETURN_S", 0.1)
    keys = shutil.copytree(made / "ours" / "server", tmp_path / "server")
    shutil.copy(made / "ours" / "authority" / "revoked.pem", keys)
    with closing(House(keys)) as opened:
        yield opened


def hello(client_id: int, **changes: object) -> bytes:
    usual = Hello(client_id, "session", f"process{client_id}", 0, 1.0)
    return json.dumps({**json.loads(greeting_to_bytes(usual)), **changes}).encode()


class Call:
    """A call by hand: what is put goes out, what comes is read."""

    def __init__(self, port: int, credentials: grpc.ChannelCredentials | None, *first: bytes) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        address = f"localhost:{port}"
        self.channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self.out = SimpleQueue[bytes | None]()
        for frame in first:
            self.out.put(frame)
        self.call = self.channel.stream_stream(METHOD)(iter(self.out.get, None), timeout=20)

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.out.put(None)
        self.call.cancel()
        self.channel.close()

    def welcome(self) -> Reception:
        return greeting_from_bytes(Reception, next(self.call))

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self.call:
                pass
        return caught.value.code(), caught.value.details()


def certified(credentials: Credentials, authority: bytes | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        authority or credentials.authority, credentials.key, credentials.certificate
    )


def site(made: Path, name: str) -> grpc.ChannelCredentials:
    return certified(load_credentials(made / "ours" / name))


def until(holds: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def is_let_in(house: House, made: Path, client_id: int = 0) -> bool:
    with Call(house.listener.port, site(made, f"site-{client_id}"), hello(client_id)) as call:
        return call.welcome().opening is None


# ── strangers ───────────────────────────────────────────────────────────────────────────────────────


def test_a_stranger_is_refused_by_tls_and_costs_no_thread(house: House, made: Path):
    ours, theirs = load_credentials(made / "ours/site-0"), load_credentials(made / "theirs/site-0")
    strangers = {
        "no TLS": None,
        "no certificate": grpc.ssl_channel_credentials(ours.authority),
        "foreign authority": certified(theirs, ours.authority),
    }
    for credentials in strangers.values():
        with Call(house.listener.port, credentials, hello(0)) as call:
            assert call.refusal()[0] == grpc.StatusCode.UNAVAILABLE
    assert house.num_threads == 0 and house.told == []
    assert is_let_in(house, made)
    assert house.num_threads > 0


def test_the_servers_certificate_is_none_of_a_site(house: House, made: Path):
    with Call(house.listener.port, site(made, "server"), hello(0)) as call:
        assert call.refusal()[0] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED)
    assert not house.transport.there and is_let_in(house, made)


def test_a_site_cannot_take_the_place_of_another(house: House, made: Path):
    with Call(house.listener.port, site(made, "site-1"), hello(0)) as call:
        code, words = call.refusal()
    assert code == grpc.StatusCode.PERMISSION_DENIED and "site-1 is not that of client 0" in words
    assert len(house.refusals) == 1 and house.transport.places[0].incarnation is None
    assert is_let_in(house, made, 1)


def test_a_refused_caller_who_asks_on_and_on_fills_no_log(house: House, made: Path, monkeypatch):
    def ask(client_id: int) -> None:
        with Call(house.listener.port, site(made, "site-1"), hello(client_id)) as call:
            call.refusal()

    for _ in range(5):
        ask(0)
    assert len(house.refusals) == 1 and house.listener.refused == 5
    ask(2)
    assert len(house.refusals) == 2, "another reason is told at once"
    monkeypatch.setattr(listener_module, "QUIET_S", 0.0)
    ask(0)
    assert "(4 more times" in house.refusals[2]


def test_callers_without_a_name_are_told_of_now_and_then_and_fill_no_audit_log(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = AuditLog(tmp_path / "audit.jsonl")
    audit_door(house.listener, log, house.told.append)
    strangers = [Caller(f"ipv6:%5B2001:db8::{n:x}%5D:1", "", b"", "") for n in range(50)]
    for stranger in strangers:
        house.listener.note_refusal(stranger, "no certificate")
    assert len(house.refusals) == MOST_UNNAMED and house.listener.refused == 50
    assert not log.path.exists()
    house.listener.note_refusal(Caller("ipv4:127.0.0.1:1", "site-1", b"", ""), "revoked")
    assert "refused site-1" in house.refusals[-1], "one with a name is told of beside any flood"
    assert log.path.read_text().count("refused site-1") == 1
    monkeypatch.setattr(listener_module, "QUIET_S", 0.0)
    house.listener.note_refusal(strangers[-1], "no certificate")
    assert len(house.refusals) == MOST_UNNAMED + 2


def test_a_certificate_that_is_revoked_is_refused_from_then_on(house: House, made: Path, tmp_path: Path):
    assert is_let_in(house, made, 2)
    authority = shutil.copytree(made / "ours/authority", tmp_path / "authority")
    revoke(authority, "site-2", passphrase=None)
    shutil.copy(authority / "revoked.pem", tmp_path / "server")
    with Call(house.listener.port, site(made, "site-2"), hello(2)) as call:
        code, words = call.refusal()
    assert code == grpc.StatusCode.PERMISSION_DENIED and "site-2 has been revoked" in words
    assert len(house.refusals) == 1 and is_let_in(house, made, 1)


def test_a_method_that_is_not_ours_is_not_answered(house: House, made: Path):
    with grpc.secure_channel(f"localhost:{house.listener.port}", site(made, "site-0")) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("greeting", "named"),
    [
        (hello(0, release="0.0.1"), ["0.0.1", __version__]),
        (hello(0, protocol=PROTOCOL + 1), [f"protocol {PROTOCOL + 1}", f"protocol {PROTOCOL}"]),
        (hello(0, release="\x1b[31m\nx"), [__version__]),
        (b"GET / HTTP/1.1", ["greeting"]),
        (b"", ["greeting"]),
        (hello(0).ljust(MAX_HELLO_BYTES + 904), ["5000 bytes", "4096"]),
        (hello(9), ["site-0 is not that of client 9"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason_in_one_line(
    house: House, made: Path, greeting: bytes, named: list[str]
):
    with Call(house.listener.port, site(made, "site-0"), greeting) as call:
        code, words = call.refusal()
    assert code == grpc.StatusCode.PERMISSION_DENIED
    (line,) = house.refusals
    assert all(name in words and name in line for name in named) and line.isprintable()
    assert house.transport.places[0].incarnation is None and is_let_in(house, made)


def test_a_client_that_is_not_of_the_run_or_was_removed_is_refused(house: House, made: Path):
    with Call(house.listener.port, site(made, "site-3"), hello(3)) as call:
        assert "there is no client 3" in call.refusal()[1]
    assert is_let_in(house, made, 1)
    house.transport.begin()
    house.transport.remove(1)
    with Call(house.listener.port, site(made, "site-1"), hello(1)) as call:
        code, words = call.refusal()
    assert code == grpc.StatusCode.FAILED_PRECONDITION and "removed" in words, "it may be let in again"
    house.transport.readmit(1)
    with Call(house.listener.port, site(made, "site-1"), hello(1)) as call:
        assert call.welcome().opening == house.opening, "the process that was removed begins anew"
    with Call(house.listener.port, site(made, "site-1"), hello(1, incarnation="new")) as call:
        assert call.welcome().rejoins


def test_a_greeting_that_never_comes_keeps_nobody_out(house: House, made: Path):
    silent = [Call(house.listener.port, site(made, "site-0")) for _ in range(10)]
    until(lambda: house.num_threads > 0)
    assert is_let_in(house, made, 1)

    def wins() -> bool:
        with suppress(grpc.RpcError):  # a silent call that came later still
            return is_let_in(house, made, 0)
        return False

    until(wins)  # the newest call of a site
    for call in silent:
        call.__exit__()
    assert house.num_threads <= 4 * 3 + 8


# ── one site, many processes ────────────────────────────────────────────────────────────────────────


def test_the_newest_call_of_a_process_goes_on_with_its_streams(house: House, made: Path):
    with Call(house.listener.port, site(made, "site-0"), hello(0)) as first:
        first.welcome()
        first.out.put(HEAD.pack(PART, 0, 0, 1, 1.0) + b"a")
        assert house.transport.receive(5, "a message") == (0, b"a")
        with Call(house.listener.port, site(made, "site-0"), hello(0)) as second:
            assert second.welcome().wanted == 1
            second.out.put(HEAD.pack(PART, 1, 0, 1, 1.0) + b"b")
            assert house.transport.receive(5, "a message") == (0, b"b")
            assert first.refusal()[0] in GONE
            assert house.transport.is_there(0)


def test_a_process_whose_first_welcome_was_lost_still_learns_that_it_rejoins(house: House, made: Path):
    assert is_let_in(house, made)
    house.transport.begin()
    for _ in range(3):
        with Call(house.listener.port, site(made, "site-0"), hello(0, incarnation="second")) as call:
            assert call.welcome().rejoins
    with Call(house.listener.port, site(made, "site-0"), hello(0, incarnation="third")) as call:
        assert call.welcome().rejoins
    with Call(house.listener.port, site(made, "site-1"), hello(1)) as call:
        assert call.welcome().rejoins, "the run has begun without it"


def test_a_process_that_was_replaced_cannot_take_the_streams_of_the_new_one(house: House, made: Path):
    assert is_let_in(house, made)
    with Call(house.listener.port, site(made, "site-0"), hello(0, incarnation="second")) as call:
        call.welcome()
        stream = house.transport.places[0].stream
    with Call(house.listener.port, site(made, "site-0"), hello(0, wanted=57)) as call:
        assert call.welcome().opening == house.opening, "it is to begin anew"
    assert house.transport.places[0].stream is stream and not stream.is_closed


@pytest.mark.parametrize("says_bye", [True, False])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_site_that_left_before_the_run_begins_comes_back_as_if_it_had_not_been_there(
    house: House, made: Path, has_begun: bool, says_bye: bool
):
    """Its operator has mended what kept it out; in a masked run its keys are those of the new process alone."""
    leave = to_bytes(Leave("LEDGER"))
    with inside(house, made) as old:
        for number, content in enumerate((b"keys", leave)):
            old.out.put(HEAD.pack(PART, number, 0, len(content), 1.0) + content)
        if says_bye:
            old.out.put(HEAD.pack(BYE, 0, 0, 0, 0.0))
            until(lambda: house.transport.places[0].must_rejoin)
        else:  # it is killed
            until(lambda: house.transport.places[0].stream.wanted == 2)
    until(lambda: not house.transport.is_there(0))
    assert "client 0 leaves before the run begins: LEDGER" in house.told
    if has_begun:
        house.transport.begin()
    with Call(house.listener.port, site(made, "site-0"), hello(0, incarnation="new")) as new:
        assert new.welcome().rejoins is has_begun
        new.out.put(HEAD.pack(PART, 0, 0, 3, 1.0) + b"new")
        until(lambda: house.transport.places[0].stream.wanted == 1)
        found = list(iter(lambda: house.transport.receive_until(house.clock.now() + 0.2), None))
        assert found == [(0, content) for content in ((b"keys", leave, b"new") if has_begun else (b"new",))]
        assert house.transport.is_there(0)


def test_what_an_old_process_sent_does_not_arrive_after_the_new_one(house: House, made: Path, monkeypatch):
    monkeypatch.setattr(remote_transport, "HELD_BYTES", -1)
    place = house.transport.places[0]
    with Call(house.listener.port, site(made, "site-0"), hello(0)) as old:
        old.welcome()
        house.transport.begin()
        old.out.put(HEAD.pack(PART, 0, 0, 3, 1.0) + b"old")
        until(lambda: place.stream.wanted == 1)
        with Call(house.listener.port, site(made, "site-0"), hello(0, incarnation="new")) as new:
            assert new.welcome().rejoins
            monkeypatch.setattr(remote_transport, "HELD_BYTES", 1 << 20)
            new.out.put(HEAD.pack(PART, 0, 0, 3, 1.0) + b"new")
            assert house.transport.receive(5, "a message") == (0, b"new")
            assert house.transport.receive_until(house.clock.now() + 0.1) is None


# ── hostile sites ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def inside(house: House, made: Path, client_id: int = 0) -> Iterator[Call]:
    with Call(house.listener.port, site(made, f"site-{client_id}"), hello(client_id)) as call:
        call.welcome()
        yield call


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"x" * 28,
        HEAD.pack(9, 0, 0, 0, 0.0),
        HEAD.pack(PART, 5, 0, 1, 0.0) + b"x",
        HEAD.pack(PART, 0, 0, (5 << 20) + 1, 0.0) + bytes(1 << 20),
        HEAD.pack(PART, 0, 0, (1 << 64) - 1, 0.0) + bytes(1 << 20),
        HEAD.pack(CONFIRM, 1 << 60, 0, 0, 0.0),
    ],
    ids=lambda frame: frame[:29].hex(),
)
def test_a_frame_that_cannot_be_ends_that_connection_and_is_told_once(house: House, made: Path, frame: bytes):
    with inside(house, made, 1) as other, inside(house, made) as call:
        call.out.put(frame)
        until(lambda: house.refusals)
        until(lambda: not house.transport.is_there(0))
        other.out.put(HEAD.pack(PART, 0, 0, 1, 1.0) + b"a")
        assert house.transport.receive(5, "a message") == (1, b"a")
    assert len(house.refusals) == 1 and house.listener.refused == 1
    assert is_let_in(house, made)


def row(**changes: object) -> list[object]:
    now_s = time.time()
    fields = {"activity": "computing", "start_s": now_s, "duration_s": 0.5, "facts": {"round_index": 3}}
    return list({**fields, **changes}.values())


NOTES = {
    "huge": json.dumps([row()] * 10_001).encode(),
    "NaN": json.dumps([row(start_s=float("nan"))]).encode(),
    "infinite": json.dumps([row(duration_s=float("inf"))]).encode(),
    "negative": json.dumps([row(duration_s=-1)]).encode(),
    "centuries ago": json.dumps([row(start_s=0.0)]).encode(),
    "centuries long": json.dumps([row(duration_s=1e10)]).encode(),
    "of another": json.dumps([row(activity="aggregating")]).encode(),
    "a fact of 4000 digits": json.dumps([row(facts={"round_index": 10**4000})]).encode(),
    "other facts": json.dumps([row(facts={"x" * 1000: 1})]).encode(),
    "a fact of text": json.dumps([row(facts={"round_index": "x"})]).encode(),
    "too long a row": json.dumps([[*row(), 1]]).encode(),
    "no list": b"{}3",
    "a number": b"7",
    "null": b"[null]",
    "deep": b"[" * 100_000,
    "no JSON": b"\xff\x00",
    "empty": b"",
}


def test_hostile_records_are_left_out_and_told_once(house: House, made: Path):
    with inside(house, made) as call:
        for number, note in enumerate(NOTES.values()):
            call.out.put(HEAD.pack(NOTE, number, 0, len(note), 1.0) + note)
        good = json.dumps([row()]).encode()
        call.out.put(HEAD.pack(NOTE, len(NOTES), 0, len(good), 1.0) + good)
        until(lambda: house.trace.spans)
        assert house.transport.is_there(0)
    (span,) = house.trace.spans
    assert span.activity == "computing" and span.facts == {"round_index": 3} and 0 <= span.start_s + 1 < 60
    assert len([line for line in house.told if "records" in line]) == 1


def test_a_site_that_tells_of_very_much_fills_no_memory(house: House, made: Path, monkeypatch):
    monkeypatch.setattr(remote_transport, "SPANS_KEPT", 40)
    place = house.transport.places[0]
    place.spans_left = 40
    with inside(house, made) as call:
        note = json.dumps([row()] * 30).encode()
        for number in range(10):
            call.out.put(HEAD.pack(NOTE, number, 0, len(note), 1.0) + note)
        until(lambda: place.stream.wanted == 10)
        assert len(house.trace.spans) == 40
        house.transport.send(0, Parcel(b"a new round", 1))
        call.out.put(HEAD.pack(NOTE, 10, 0, len(note), 1.0) + note)
        until(lambda: len(house.trace.spans) >= 70)


@pytest.mark.parametrize("sent_s", [0.0, -1e308, 1e308, float("nan"), float("inf"), float("-inf")])
def test_a_transfer_lasts_no_longer_than_the_run(house: House, made: Path, sent_s: float):
    with inside(house, made) as call:
        call.out.put(HEAD.pack(PART, 0, 1 << 30, 3, sent_s) + b"abc")
        house.transport.receive(5, "a message")
    (span,) = house.trace.spans
    assert 0 <= span.start_s <= span.start_s + span.duration_s < house.clock.now() + 1
    assert house.transport.ledger.of_round(8).up[0][0] == 3, "it counts for the last round"


@pytest.mark.parametrize("size", [0, 1, 1 << 18])
def test_a_site_that_floods_a_busy_server_is_stopped(house: House, made: Path, monkeypatch, size: int):
    monkeypatch.setattr(remote_transport, "WAITING_BYTES", 1 << 20)
    monkeypatch.setattr(remote_transport, "HELD_BYTES", 1 << 20)
    place, content = house.transport.places[0], b"x" * size
    limit = 2 * ((1 << 20) // (size + MESSAGE_BYTES) + 1)
    with inside(house, made) as call, inside(house, made, 1) as other:
        for number in range(limit + 60):
            call.out.put(HEAD.pack(PART, number, 0, size, 1.0) + content)
        until(lambda: place.held_bytes > 1 << 20)
        time.sleep(0.1)
        assert house.transport._inbox._items.qsize() <= limit
        other.out.put(HEAD.pack(PART, 0, 0, 4, 1.0) + b"mine")
        until(lambda: house.transport.places[1].stream.wanted == 1)
        got = []
        while len(got) < limit + 61:
            got.append(house.transport.receive(5, "a message"))
        assert got.count((1, b"mine")) == 1 and got.count((0, content)) == limit + 60
        assert got.index((1, b"mine")) <= limit + 1, "the other one does not wait behind the flood"


@pytest.mark.parametrize("held_bytes", [remote_transport.HELD_BYTES, -1], ids=["as it is", "held up"])
def test_while_nobody_takes_what_a_site_sends_all_that_goes_to_it_goes_on(
    house: House, made: Path, monkeypatch: pytest.MonkeyPatch, held_bytes: int
):
    monkeypatch.setattr(remote_transport, "WAITING_BYTES", 2 << 20)
    monkeypatch.setattr(remote_transport, "HELD_BYTES", held_bytes)
    content = bytes(1 << 20)
    confirmed, arrived = list[int](), list[int]()
    with inside(house, made) as call:

        def read() -> None:
            with suppress(grpc.RpcError):  # at its end
                for frame in call.call:
                    kind, number, *_ = HEAD.unpack_from(frame)
                    if kind == PART:
                        arrived.append(number)
                        call.out.put(HEAD.pack(CONFIRM, number + 1, 0, 0, 0.0))
                    elif kind == CONFIRM:
                        confirmed.append(number)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        for number in range(5):
            call.out.put(HEAD.pack(PART, number, 0, len(content), 1.0) + content)
        until(lambda: house.transport.places[0].stream.wanted == (5 if held_bytes > 0 else 1))
        for _ in range(10):
            house.transport.send(0, Parcel(content, 8))
        if held_bytes < 0:  # where the reader waits, the site's confirmations wait with it
            time.sleep(0.3)
            assert len(arrived) == 2
            return
        until(lambda: len(arrived) == 10)
        assert confirmed[-1:] != [5], "so the site does not send on for ever"
        for _ in range(5):
            house.transport.receive(5, "a message")
        until(lambda: confirmed[-1:] == [5])


@pytest.mark.parametrize("has_begun", [False, True])
def test_what_waits_of_a_site_that_begins_anew_again_and_again_is_bounded(
    house: House, made: Path, monkeypatch: pytest.MonkeyPatch, has_begun: bool
):
    for name in ("WAITING_BYTES", "HELD_BYTES"):
        monkeypatch.setattr(remote_transport, name, 1 << 20)
    place, content = house.transport.places[0], bytes(1 << 19)
    if has_begun:
        house.transport.begin()
    for process in range(6):
        with Call(house.listener.port, site(made, "site-0"), hello(0, incarnation=f"{process}")) as call:
            call.welcome()
            for number in range(6):
                call.out.put(HEAD.pack(PART, number, 0, len(content), 1.0) + content)
            until(lambda: place.stream.wanted > 0)
            time.sleep(0.05)
    assert 2 << 20 < place.waiting_bytes < (2 << 20) + 3 * len(content)


def test_calls_of_a_site_whose_reader_waits_take_no_threads_from_the_others(
    house: House, made: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote_transport, "HELD_BYTES", -1)
    stream = house.transport.places[0].stream
    for _ in range(house.listener._pool._max_workers + 1):
        wanted = stream.wanted
        with Call(house.listener.port, site(made, "site-0"), hello(0, wanted=0)) as call:
            call.welcome()
            call.out.put(HEAD.pack(PART, wanted, 0, 1, 1.0) + b"a")
            time.sleep(0.02)
    assert stream.wanted == 1, "the first one waits"
    for client_id in (1, 2):
        with inside(house, made, client_id) as call:
            call.out.put(HEAD.pack(NOTE, 0, 0, 2, 1.0) + b"[]")
            until(lambda i=client_id: house.transport.places[i].stream.wanted == 1)


def test_a_join_of_a_process_that_is_gone_is_not_answered_to_the_next_one(house: House, made: Path):
    house.transport.begin()
    for incarnation, version in (("one", 3), ("two", NEVER)):
        join = to_bytes(Join((version,), ()))
        with Call(house.listener.port, site(made, "site-0"), hello(0, incarnation=incarnation)) as call:
            call.welcome()
            for number, content in enumerate((join, b"more")):
                call.out.put(HEAD.pack(PART, number, 0, len(content), 1.0) + content)
            until(lambda: house.transport.places[0].stream.wanted == 2)
    found = list(iter(lambda: house.transport.receive_until(house.clock.now() + 0.2), None))
    assert found == [(0, b"more"), (0, join), (0, b"more")], "of what is gone its updates are counted"


def test_of_a_process_that_is_gone_no_half_message_is_kept(house: House, made: Path):
    content, kept = bytes(1 << 20), weakref.WeakSet[NumberedStream]()
    for incarnation in range(4):
        with Call(house.listener.port, site(made, "site-0"), hello(0, incarnation=f"{incarnation}")) as call:
            call.welcome()
            kept.add(stream := house.transport.places[0].stream)
            call.out.put(HEAD.pack(PART, 0, 0, 3 << 20, 1.0) + content)
            until(lambda s=stream: s.wanted == 1)
    del stream
    until(lambda: gc.collect() >= 0 and len(kept) == 1)
    (last,) = kept
    last.close()
    assert not last._come and not last._out
    with pytest.raises(CodecError, match="closed"):
        last.attach(0)


def test_who_is_removed_while_its_message_waits_says_nothing_more(house: House, made: Path, monkeypatch):
    monkeypatch.setattr(remote_transport, "HELD_BYTES", -1)
    with inside(house, made) as call:
        call.out.put(HEAD.pack(PART, 0, 0, 3, 1.0) + b"abc")
        until(lambda: house.transport.places[0].stream.wanted == 1)
        house.transport.remove(0)
        client_id, message = house.transport.receive(5, "a message")
        assert (client_id, message) == (0, to_bytes(Leave("the operator has removed it")))
        assert house.transport.receive_until(house.clock.now() + 0.1) is None


def test_a_process_joins_once(house: House, made: Path):
    join = to_bytes(Join((NEVER,), ()))
    with inside(house, made) as call:
        for number in range(3):
            call.out.put(HEAD.pack(PART, number, 0, len(join), 1.0) + join)
        assert house.transport.receive(5, "a message") == (0, join)
        until(lambda: house.refusals)
        assert house.transport.receive_until(house.clock.now() + 0.1) is None
    assert "joins once more" in house.refusals[0]


def test_a_site_that_never_reads_does_not_slow_the_others(house: House, made: Path):
    content = bytes(1 << 20)
    with inside(house, made) as stalled, inside(house, made, 1) as fast:
        for _ in range(40):
            for client_id in (0, 1):
                house.transport.send(client_id, Parcel(content, 0))
        read = 0
        while read < 40:
            frame = next(fast.call)
            read += frame[0] == PART
            fast.out.put(HEAD.pack(CONFIRM, read, 0, 0, 0.0))
        until(lambda: house.transport.places[1].stream.waiting_bytes == 0)
        waiting = list(house.transport.places[0].stream._out)
        assert len(waiting) == 40 and all(each.content is content for each in waiting), "the same bytes for all"
        assert stalled.call.is_active()


# ── the server's own troubles ───────────────────────────────────────────────────────────────────────


FULL = StorageError("the disk is full", remedy="Free some space.")


class FullLog(AuditLog):
    """A log on a disk with room for everything but that an update begins to come."""

    def append(self, kind: str, **facts: object) -> str:
        if kind == BEGUN:
            raise FULL
        return super().append(kind, **facts)


@pytest.mark.parametrize("make_log", [FullLog, AuditLog])
def test_a_full_disk_of_the_server_ends_its_run_and_is_no_cut(
    house: House, made: Path, tmp_path: Path, make_log: type[AuditLog]
):
    """What begins to come is recorded in the thread that reads."""
    transport, update = house.transport, encode({"kind": "Update"})
    transport._releases = ReleaseLedger(make_log(tmp_path / "audit.jsonl"))
    transport._releases.record(ASKED, 3, clients=(0,))
    with inside(house, made) as call:
        call.out.put(HEAD.pack(PART, 0, 3, len(update), 1.0) + update)
        if make_log is AuditLog:
            assert transport.receive(5, "an update") == (0, update)
            return
        with pytest.raises(StorageError, match="the disk is full"):
            transport.receive(5, "an update")
        until(lambda: not transport.is_there(0))
    assert house.told[-1] == "client 0 is not connected any more: the server fails" and not house.refusals
    for _ in range(3):
        with Call(house.listener.port, site(made, "site-0"), hello(0)) as call:
            code, words = call.refusal()
        assert code == grpc.StatusCode.FAILED_PRECONDITION and "error of its own" in words
    transport._is_over = True
    with Call(house.listener.port, site(made, "site-0"), hello(0)) as call:
        assert call.welcome().is_over, "then it learns that the session has ended"


def test_a_line_of_the_door_that_cannot_be_recorded_ends_the_run(house: House, made: Path):
    def tell(line: str) -> None:
        if "not connected any more" in line:
            raise FULL

    house.listener.tell = tell
    with inside(house, made):
        assert house.transport.receive_until(house.clock.now() + 0.1) is None, "its coming was recorded"
    with pytest.raises(StorageError, match="the disk is full"):
        house.transport.receive(5, "a message")


def test_an_error_of_the_servers_own_ends_its_wait_for_sites_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote_transport, "RETURN_S", 0.1)
    looks = iter(range(20))
    hooks = replace(QUIET, asked_to_stop=lambda: next(looks, None) is None)
    town = Town(tmp_path, server_plan(2, 3, 1), [1, 2])
    assert not town.serve(hooks).finished
    looks = iter(range(20))
    with pytest.raises(StorageError, match="the disk is full"):
        town.serve(hooks, on_open=lambda transport: transport.fail(FULL))


@pytest.mark.parametrize("confirms", [True, False])
def test_the_end_of_a_run_reaches_a_site_whose_late_updates_nobody_takes(
    house: House, made: Path, monkeypatch: pytest.MonkeyPatch, confirms: bool
):
    monkeypatch.setattr(remote_transport, "WAITING_BYTES", 1)
    monkeypatch.setattr(remote_transport, "HELD_BYTES", 1)
    content = bytes(1 << 20)
    with inside(house, made) as call:
        for number in range(4):
            call.out.put(HEAD.pack(PART, number, 0, 1, 1.0) + b"a")
        until(lambda: house.transport.places[0].stream.wanted == 3)
        for _ in range(4):
            house.transport.send(0, Parcel(content, 8))
        closing_ = threading.Thread(target=house.transport.close, args=(0.5,))
        closing_.start()
        kinds = list[int]()
        for frame in call.call:
            kinds.append(frame[0])
            if frame[0] == PART and confirms:
                call.out.put(HEAD.pack(CONFIRM, kinds.count(PART), 0, 0, 0.0))
        closing_.join(10)
        assert not closing_.is_alive()
    unreached = [line for line in house.told if "the end of the run did not reach client 0" in line]
    if confirms:
        assert kinds.count(PART) == 4 and kinds[-1] == BYE and not unreached
    else:
        assert kinds.count(PART) == 2 and BYE not in kinds and unreached


# ── a run with a hostile site ───────────────────────────────────────────────────────────────────────


EXAMPLES = [3, 1, 2]


class Unheard(Exception):  # noqa: N818
    """An error that nothing raises."""


def deeds(client_id: int) -> list[bytes]:
    digits = int("9" * 4300)
    odd = [Join((7, 99, -5, 10**17), (5, 10**17, -3)), Join((-(10**18),) * BLOCKS, ()), Join((NEVER,) * 90, ())]
    skips = [Skip(0, "nothing works"), Skip(10**18), Skip(-7, "x"), Skip(3, "no")]
    raw = json.dumps({"kind": "Skip", "round_index": digits, "problem": "", "vectors": []})
    fields = {"kind": "Update", "round_index": 0, "block_index": 0, "client_id": client_id, "num_examples": 1}
    fields |= {"committed": -1, "train_loss": 1.0, "num_local_steps": 1, "compute_s": "5e-324"}
    return [
        to_bytes(odd[0]),
        b"",
        b"garbage",
        raw.encode(),
        encode({**fields, "chunk_index": digits, "num_chunks": digits}),
        encode({"kind": "x" * 500_000}),
        encode({"kind": "Leave", "problem": "\x1b[2J\x1b[31mhospital 0 was hacked"}),
        *map(to_bytes, [*skips, Leave("goes"), Leave(), Leave()]),
        *[b"flood"] * 300,
        to_bytes(odd[1]),
    ]


@pytest.mark.parametrize("checks", [True, False], ids=["as it is", "without the check, as it was"])
def test_a_run_goes_on_to_the_right_model_whatever_one_site_sends(tmp_path: Path, monkeypatch, checks: bool):
    if not checks:  # what cannot be decoded ends everybody's run
        monkeypatch.setattr(server, "CodecError", Unheard)
    monkeypatch.setattr(remote_transport, "RETURN_S", 0.3)
    count, many = Refusals.count, threading.Event()

    def count_on(refusals: Refusals, client_id: int, refusal: Refusal) -> None:
        count(refusals, client_id, refusal)
        if refusals.counts["corrupt"] > 100:
            many.set()

    monkeypatch.setattr(Refusals, "count", count_on)

    class Patient(ToyTrainer):
        """A trainer whose run is not over before the attack is."""

        def train(self, round_index, *rest) -> Trained:
            assert round_index < 5 or many.wait(30)
            return super().train(round_index, *rest)

    method = server_plan(
        3,
        9,
        1,
        Differences(Encoding("float32", chunk_bytes=8)),
        checkpoint_every=2,
        min_updates=2,
        stall_timeout_s=60.0,
    )
    events, counted = list[str](), dict[int, list[int]]()

    def on_commit(state, updates, _) -> None:
        counted[state.committed] = [update.client_id for update in updates]

    town = Town(tmp_path, method, EXAMPLES, make_trainer=Patient)
    for client_id in (0, 1):
        town.start(client_id)

    def attack() -> None:
        until(lambda: town.port and town.transport is not None)
        session = town.transport.opening.session
        with Call(town.port, None, hello(2, session=session)) as call:
            call.welcome()
            for number, deed in enumerate(deeds(2)):
                call.out.put(HEAD.pack(PART, number, 0, len(deed), 1.0) + deed)
            with suppress(grpc.RpcError, StopIteration):
                for _ in call.call:
                    pass

    town.transport = None
    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        with nullcontext() if checks else pytest.raises(CodecError):
            result = town.serve(Hooks(on_commit, lambda _: None, on_event=events.append))
    finally:
        town.end()
        attacker.join(10)
    if not checks:
        return
    assert result.finished and counted == {t: [0, 1] for t in range(9)}
    trainers = [ToyTrainer(i, EXAMPLES[i], None) for i in (0, 1)]
    alone = run_here(initial(BLOCKS), trainers, replace(method, num_clients=2), Trace(RealClock()), QUIET)
    assert same(result.server.params, alone.server.params)
    assert result.refused["corrupt"] > 100 and sum("refused" in line for line in events) <= 100
    assert all(len(line) < 2000 and line.isprintable() for line in events)


def test_a_site_that_is_cut_is_told_once(house: House, made: Path):
    def told() -> int:
        return sum("client 1 is not connected any more" in line for line in house.told)

    credentials = load_credentials(made / "ours" / "site-1")
    for times in (1, 2):
        with Call(house.listener.port, certified(credentials), hello(1)) as call:
            call.welcome()
            until(lambda: house.told and "client 1 is connected" in house.told[-1])
        until(lambda: told() == times)  # noqa: B023
        assert told() == times
