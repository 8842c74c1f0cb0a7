"""Keys and certificates of a deployment."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from parablock.deploy.credentials import make_keys
from parablock.errors import StorageError


def test_keys_make_a_connection_that_only_their_authority_vouches_for(tmp_path: Path):
    make_keys(tmp_path / "keys", 2, ["localhost", "127.0.0.1"])
    make_keys(tmp_path / "other", 1, ["localhost"])
    assert sorted(path.name for path in (tmp_path / "keys" / "server").iterdir()) == [
        "ca.pem",
        "server.key",
        "server.pem",
        "site-0.pub",
        "site-1.pub",
    ]
    for secret in (tmp_path / "keys").rglob("*.key"):
        assert secret.stat().st_mode & 0o077 == 0
    assert _handshake(tmp_path / "keys", tmp_path / "keys" / "site-0" / "ca.pem") == ""
    assert "certificate verify failed" in _handshake(tmp_path / "keys", tmp_path / "other" / "ca.pem")
    with pytest.raises(StorageError, match="not empty"):
        make_keys(tmp_path / "keys", 1, ["localhost"])


def _handshake(keys: Path, authority: Path) -> str:
    """Shake hands in memory; give why it fails."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(keys / "server" / "server.pem", keys / "server" / "server.key")
    client = ssl.create_default_context(cafile=str(authority))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return str(error)
    return ""
