"""The door of a direct deployment: addresses, ports, strangers, proxies, and words for what is wrong."""

from __future__ import annotations

import os
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path

import pytest

from parablock.deploy.authority import load_credentials, make_all
from parablock.deploy.door import check_keys, diagnose, host_and_port, listen, server_of
from parablock.engine.remote.grpc_options import settle_environment
from parablock.errors import ConfigError, InputError


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
    with pytest.raises(ConfigError, match="--keys DIR, or --insecure"):
        check_keys(None, insecure=False)
    with pytest.raises(ConfigError, match="--keys DIR, or --insecure"):
        check_keys(keys, insecure=True)
    with pytest.raises(ConfigError, match="this machine alone"):
        listen("0.0.0.0:0", None, 1, print)
    with pytest.raises(ConfigError, match="this machine alone"):
        server_of("fl.example.org:8000", None, print)
    listen("127.0.0.1:0", None, 1, print).close()


def test_a_port_that_is_taken_is_told_with_the_process_that_has_it(keys: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} .* is taken: process {os.getpid()} "):
            listen(f"127.0.0.1:{port}", keys / "server", 1, print)
    listen(f"127.0.0.1:{port}", keys / "server", 1, print).close()


def test_a_stranger_without_a_certificate_gets_no_answer_and_a_line_on_standard_error(keys: Path, capfd):
    listener = listen("127.0.0.1:0", keys / "server", 2, print)
    try:
        context = ssl.create_default_context(cafile=str(keys / "server" / "authority.pem"))
        plain = socket.create_connection(("127.0.0.1", listener.port))
        with suppress(OSError), context.wrap_socket(plain, server_hostname="127.0.0.1") as stranger:
            stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert stranger.recv(100) == b""
        words, give_up = "", time.monotonic() + 10
        while "Handshake failed" not in words and time.monotonic() < give_up:
            time.sleep(0.05)
            words += capfd.readouterr().err
        assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in words
        credentials = load_credentials(keys / "site-0")
        assert diagnose("127.0.0.1", listener.port, credentials) == "", "one with a certificate is let in"
    finally:
        listener.close()


def test_what_keeps_a_site_from_its_server_is_told_in_words(keys: Path, tmp_path: Path):
    make_all(tmp_path / "others", 1, ["127.0.0.1"])
    ours, theirs = load_credentials(keys / "site-0"), load_credentials(tmp_path / "others" / "site-0")
    listener = listen("0.0.0.0:0", keys / "server", 2, print)
    try:
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
