"""The door of a direct deployment: addresses, ports, strangers, proxies, and words for what is wrong."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path

import grpc
import psutil
import pytest
import yaml

from cuttable_proxy import CuttableProxy
from parablock.clock import RealClock
from parablock.deploy import authority
from parablock.deploy.authority import install_certificate, load_credentials, make_all, make_renewal, sign_request
from parablock.deploy.certificates import key_and_end, now
from parablock.deploy.door import NO_CERTIFICATE, check_keys, diagnose, host_and_port, listen, server_of
from parablock.deploy.site_check import check_site
from parablock.deploy.site_identity import CertificateIdentity
from parablock.deploy.strangers import PAUSE_S
from parablock.engine.remote import site_inbox
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.grpc_options import settle_environment
from parablock.engine.remote.listener import Listener
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.engine.remote.site_channel import SiteCaller, SiteChannel
from parablock.errors import ConfigError, InputError, ParaBlockError
from parablock.trace import Trace
from parablock.wire.transport import MESSAGE_BYTES, Parcel


@pytest.fixture(autouse=True)
def _environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "no_proxy"):  # which `settle_environment` sets
        monkeypatch.setenv(name, "")  # noted, so that it is as before after the test
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("door") / "keys"
    make_all(folder, 2, ["127.0.0.1"])
    return folder


@pytest.mark.parametrize(
    ("address", "parts"),
    [("fl.example.org:8000", ("fl.example.org", 8000)), ("[::1]:80", ("::1", 80)), ("0.0.0.0:0", ("0.0.0.0", 0))],
)
def test_an_address_is_taken_apart(address: str, parts: tuple[str, int]):
    assert host_and_port(address) == parts


@pytest.mark.parametrize("address", ["fl.example.org", ":80", "host:", "host:x", "::1:80", "host:70000", ""])
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(ConfigError, match="is no address"):
        host_and_port(address)


def test_keys_or_insecure_and_never_insecure_beyond_this_machine(keys: Path):
    with pytest.raises(ConfigError, match="neither --keys nor --insecure is given; give --keys DIR"):
        check_keys(None, insecure=False)
    with pytest.raises(ConfigError, match="both --keys and --insecure are given"):
        check_keys(keys, insecure=True)
    with pytest.raises(ConfigError, match="this machine alone"):
        listen("0.0.0.0:0", None, 1, print)
    with pytest.raises(ConfigError, match="this machine alone"):
        server_of("fl.example.org:8000", None, print)
    listen("127.0.0.1:0", None, 1, print).close()


def test_the_server_checks_what_sites_sign_where_they_have_certificates(keys: Path):
    for folder, believes in ((keys / "server", CertificateIdentity), (None, type(None))):
        listener = listen("127.0.0.1:0", folder, 1, print)
        listener.close()
        assert type(listener.identity) is believes


def test_a_port_that_is_taken_is_told_with_the_process_that_has_it(keys: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ParaBlockError, match=rf"port {port} .* is taken: process {os.getpid()} "):
            listen(f"127.0.0.1:{port}", keys / "server", 1, print)
    listen(f"127.0.0.1:{port}", keys / "server", 1, print).close()


def until(what: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 90
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def stranger_at(port: int, context: ssl.SSLContext) -> str:
    """Shake hands, which must come to nothing; return the address that this came from."""
    with socket.create_connection(("127.0.0.1", port)) as plain:
        host, own = plain.getsockname()
        with suppress(OSError), context.wrap_socket(plain, server_hostname="127.0.0.1") as stranger:
            stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert stranger.recv(100) == b""
    return f"{host}:{own}"


@pytest.mark.parametrize("shows", ["no certificate", "one of another authority"])
def test_strangers_get_no_answer_and_the_servers_log_has_their_address(keys: Path, tmp_path: Path, shows: str):
    told: list[str] = []
    listener = listen("127.0.0.1:0", keys / "server", 2, told.append)
    context = ssl.create_default_context(cafile=str(keys / "server" / "authority.pem"))
    if shows == "one of another authority":
        make_all(tmp_path / "others", 1, ["127.0.0.1"])
        context.load_cert_chain(tmp_path / "others/site-0/site.pem", tmp_path / "others/site-0/site.key")
    try:
        with pytest.raises(ConnectionError, match="not ready yet"):
            site_of(listener.port, keys).ask()
        until(lambda: not connected(listener))
        listener.look()
        assert (listener.refused, told) == (0, []), "one with a certificate is no stranger"
        came_from: list[str] = []

        def is_told_of() -> bool:  # who comes while the table is not read is not seen, so one comes until he is
            time.sleep(10 * PAUSE_S)
            came_from.append(stranger_at(listener.port, context))
            time.sleep(PAUSE_S)
            listener.look()
            return bool(told)

        until(is_told_of)
        assert told[0] in {f"refused a caller from {one}: {NO_CERTIFICATE}" for one in came_from}
        assert listener.refused == len(told)
    finally:
        listener.close()


def test_a_check_that_finds_its_server_is_no_stranger_there(keys: Path, tmp_path: Path):
    """A probe beside the call would be one that comes and makes none, and a line for the server's operator."""
    told: list[str] = []
    listener = listen("127.0.0.1:0", keys / "server", 2, told.append)
    listener.open(RemoteTransport(Opening("run", "s", "", ""), 2, 64, 1 << 20, Trace(RealClock())))
    site = {"client_id": 0, "state_dir": str(tmp_path / "state"), "data": {"train": [str(tmp_path / "gone.jsonl")]}}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site | {"model": {"name_or_path": str(tmp_path)}}))
    try:
        for _ in range(3):
            time.sleep(10 * PAUSE_S)  # so that the table is read for the first handshake
            found = check_site(tmp_path / "site.yaml", f"127.0.0.1:{listener.port}", keys / "site-0")
            said = [one.found for one in islice(found, 4) if one.is_good]
            assert f"127.0.0.1:{listener.port} can be reached, and its certificate is right" in said
            assert "the server lets this site in, and has run run for it" in said
            until(lambda: not connected(listener))
            listener.look()
        assert (listener.refused, told) == (0, [])
    finally:
        listener.close()
    found = list(check_site(tmp_path / "site.yaml", f"127.0.0.1:{listener.port}", keys / "site-0"))
    assert any("cannot be reached" in one.found for one in found if not one.is_good)


def test_a_site_that_has_left_a_run_says_so_while_the_run_goes_on(keys: Path):
    told: list[str] = []
    listener = listen("127.0.0.1:0", keys / "server", 2, print)
    listener.open(RemoteTransport(Opening("run", "s", "", ""), 2, 64, 1 << 20, Trace(RealClock())))

    def open_another() -> None:
        listener.open(RemoteTransport(Opening("run", "next", "", ""), 2, 64, 1 << 20, Trace(RealClock())))

    try:
        site = site_of(listener.port, keys, told.append)
        assert site.wait_for_session(RealClock(), "s", open_another).session == "next"
    finally:
        listener.close()
    assert told == ["the server is still at the run that this site has left"]


def site_of(port: int, keys: Path, tell: Callable[[str], None] = print) -> SiteCaller:
    return SiteCaller(0, server_of(f"127.0.0.1:{port}", keys / "site-0", tell), tell)


def connected(listener: Listener) -> bool:
    rows = psutil.Process().net_connections("tcp")
    return any(
        row.raddr and row.laddr.port == listener.port and row.status != psutil.CONN_TIME_WAIT for row in rows
    )


def renewed(keys: Path, monkeypatch: pytest.MonkeyPatch, valid_s: float) -> None:
    """Let a site renew its certificate, which is then valid for so many seconds."""
    with monkeypatch.context() as patch:
        patch.setattr(authority, "now", lambda: now() + timedelta(seconds=valid_s, days=-1))
        make_renewal(keys / "site-0")
        answer = sign_request(
            keys / "site-0" / "site.csr", keys / "authority", passphrase=None, days=1, output_dir=keys / "answers"
        )
    install_certificate(keys / "site-0", answer, keys / "answers" / "authority.pem")


def test_a_site_whose_certificate_ends_waits_and_goes_on_with_the_renewed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_all(keys := tmp_path / "keys", 1, ["127.0.0.1"])
    told, listener = list[str](), listen("127.0.0.1:0", keys / "server", 1, print)
    transport = RemoteTransport(Opening("run", "s", "", ""), 1, 64, 1 << 20, Trace(RealClock()))
    listener.open(transport)
    proxy = CuttableProxy(listener.port, 1e9)
    renewed(keys, monkeypatch, valid_s=3.0)
    site = site_of(proxy.port, keys, told.append)
    opening = site.ask().opening
    assert opening is not None
    with closing(
        SiteChannel(site, opening, "incarnation", Trace(RealClock()), lease_s=60.0, decode=bytes)
    ) as channel:
        channel.open()
        until(lambda: 0 in listener.certificates)  # which is noted behind the welcome
        first = listener.certificates[0]
        assert "ends in 0 days" in told[0] and "parablock deploy keys renew" in told[0]
        until(lambda: now() > key_and_end(first)[1])
        transport.send(0, Parcel(b"after the end", 0))
        assert channel.receive() == b"after the end", "what is connected outlives its certificate"
        proxy.cut(0.0)
        until(lambda: any("has expired" in line and "parablock deploy keys request" in line for line in told))
        assert not transport.is_there(0)
        transport.send(0, Parcel(b"with the new one", 0))
        renewed(keys, monkeypatch, valid_s=3600.0)
        assert channel.receive() == b"with the new one"
        assert listener.certificates[0] not in (first, b"")
        transport.leave()
    proxy.close()
    listener.close()


def test_a_server_shows_another_certificate_with_a_renewal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """gRPC may crash where hands are shaken while it gets another one, though it were the same."""
    make_all(keys := tmp_path / "keys", 1, ["127.0.0.1"])
    fetchers = []
    with monkeypatch.context() as patch:
        make = grpc.dynamic_ssl_server_credentials
        patch.setattr(
            grpc,
            "dynamic_ssl_server_credentials",
            lambda first, fetch, asks: (fetchers.append(fetch), make(first, fetch, asks))[1],
        )
        listener = listen("127.0.0.1:0", keys / "server", 1, print)
    (shown,) = fetchers
    assert [shown() for _ in range(3)] == [None] * 3
    make_renewal(keys / "server")
    assert shown() is None, "asked for, and not signed yet"
    answer = sign_request(
        keys / "server" / "server.csr", keys / "authority", passphrase=None, days=7, output_dir=keys / "answers"
    )
    install_certificate(keys / "server", answer, keys / "answers" / "authority.pem")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: shown(), range(16)))
    assert len([each for each in found if each is not None]) == 1
    assert shown() is None
    listener.close()


STORM = """
import socket, ssl, sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from parablock.deploy.door import listen

listener = listen("127.0.0.1:0", Path(sys.argv[1]), 1, lambda words: None)
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["h2"])

def call(_):
    with suppress(OSError), context.wrap_socket(socket.create_connection(("127.0.0.1", listener.port), 5)):
        return 1
    return 0

with ThreadPoolExecutor(16) as pool:
    print("alive after", sum(pool.map(call, range(2000))))
listener.close()
"""


def test_strangers_who_call_at_once_do_not_end_the_server(keys: Path):
    """Given a certificate with each connection, gRPC ended the process in every other storm such as this."""
    storm = subprocess.run(
        [sys.executable, "-c", STORM, str(keys / "server")], capture_output=True, text=True, timeout=120
    )
    assert storm.returncode == 0, storm.stderr[-2000:]
    assert int(storm.stdout.split("alive after ")[1]) > 1000, "handshakes that began"


def test_whatever_ends_the_connection_reaches_who_waits_for_a_message(keys: Path):
    def without_memory(_: bytes) -> bytes:
        raise MemoryError("too large")

    listener = listen("127.0.0.1:0", keys / "server", 1, print)
    transport = RemoteTransport(Opening("run", "s", "", ""), 1, 64, 1 << 20, Trace(RealClock()))
    listener.open(transport)
    site = site_of(listener.port, keys, print)
    opening = site.ask().opening
    assert opening is not None
    trace = Trace(RealClock())
    with closing(SiteChannel(site, opening, "incarnation", trace, lease_s=60.0, decode=without_memory)) as channel:
        channel.open()
        transport.send(0, Parcel(b"a message", 0))
        with pytest.raises(MemoryError, match="too large"):
            channel.receive()
        transport.leave()
    listener.close()


@pytest.mark.parametrize("size", [1, 1 << 12])
def test_a_server_that_floods_a_busy_site_keeps_what_has_no_room(
    keys: Path, size: int, monkeypatch: pytest.MonkeyPatch
):
    most = 1 << 16
    monkeypatch.setattr(site_inbox, "PART_OF_MEMORY", psutil.virtual_memory().total // most)
    listener = listen("127.0.0.1:0", keys / "server", 1, print)
    transport = RemoteTransport(Opening("run", "s", "", ""), 1, 64, 1 << 20, Trace(RealClock()))
    listener.open(transport)
    proxy = CuttableProxy(listener.port, 1e9)
    site = site_of(proxy.port, keys, print)
    opening = site.ask().opening
    assert opening is not None
    limit = most // (2 * size + MESSAGE_BYTES) + 2
    sent = [number.to_bytes(2, "big") * size for number in range(limit + 60)]
    with closing(SiteChannel(site, opening, "i", Trace(RealClock()), lease_s=60.0, decode=bytes)) as channel:
        channel.open()
        for message in sent:
            transport.send(0, Parcel(message, 0))
        until(lambda: channel.inbox.waiting_bytes > most)
        time.sleep(0.1)
        assert channel.inbox._items._items.qsize() <= limit
        assert transport.places[0].stream.waiting_bytes >= 58 * 2 * size, "what is not taken is not confirmed"
        proxy.cut(0.0)
        until(lambda: not transport.is_there(0))
        until(lambda: transport.is_there(0))  # whether or not there is room
        time.sleep(0.1)
        assert channel.inbox._items._items.qsize() <= limit + 1
        assert [channel.receive() for _ in sent] == sent
        until(lambda: transport.places[0].stream.waiting_bytes == 0)
        for message in sent:
            transport.send(0, Parcel(message, 0))
        until(lambda: channel.inbox.waiting_bytes > most)  # and the site can close while something waits for room
    assert not channel._thread.is_alive()
    transport.leave()
    proxy.close()
    listener.close()


def test_what_keeps_a_site_from_its_server_is_told_in_words(keys: Path, tmp_path: Path):
    make_all(tmp_path / "others", 1, ["127.0.0.1"])
    ours, theirs = load_credentials(keys / "site-0"), load_credentials(tmp_path / "others" / "site-0")
    listener = listen("0.0.0.0:0", keys / "server", 2, print)
    try:
        assert diagnose("127.0.0.1", listener.port, ours) == ""
        assert "is not trusted" in diagnose("127.0.0.1", listener.port, theirs)
        assert "is not for 127.0.0.2" in diagnose("127.0.0.2", listener.port, ours)
    finally:
        listener.close()
    assert "cannot be reached" in diagnose("127.0.0.1", listener.port, ours)


def test_proxies_are_seen_under_either_spelling_and_never_used_to_this_machine(monkeypatch):
    for name in ("https_proxy", "no_proxy", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet")
    settle_environment()
    settle_environment()  # and a second time changes nothing
    assert os.environ["https_proxy"] == "http://proxy:3128"
    assert os.environ["no_proxy"] == "intranet,localhost,127.0.0.1,::1"
    monkeypatch.setenv("https_proxy", "http://other:1")
    settle_environment()
    assert os.environ["https_proxy"] == "http://other:1"


def test_a_server_with_the_keys_of_a_site_is_told_so(keys: Path):
    with pytest.raises(InputError, match="certificate of site-0, not a server's"):
        listen("127.0.0.1:0", keys / "site-0", 1, print)
    listen("127.0.0.1:0", keys / "server", 1, print).close()
