"""Who reaches the server's port and has no certificate that counts.

TLS ends such a connection inside gRPC, which has but a line on standard error for it, without an address. So when
a handshake begins, whoever is connected is looked up in the system's table of connections, and is told of once his
connection has ended without a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import unquote

import psutil

MOST_LOOKS_PER_S = 20
"""The table is read so often at most, however many strangers come."""
OPEN = (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)

Peer = tuple[str, int]


class Strangers:
    """Tells of those who begin handshakes at a port and make no call; its callers may be any threads."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.port, self._tell = 0, tell
        self._waiting, self._known = set[Peer](), set[Peer]()
        self._looked_s = 0.0

    def shakes_hands(self) -> None:
        """Note who is there, since a handshake begins."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= 1 / MOST_LOOKS_PER_S:
            self._looked_s = now_s
            self._waiting |= self._connected() - self._known

    def calls(self, address: str) -> None:
        """Note that somebody makes a call, by an address as gRPC writes it: he has a certificate that counts."""
        _, _, rest = unquote(address).partition(":")
        host, _, port = rest.rpartition(":")
        with suppress(ValueError):
            peer = _peer(host, int(port))
            self._known.add(peer)
            self._waiting.discard(peer)

    def look(self) -> None:
        """Tell of those who have gone without a call."""
        if not (self._waiting or self._known):
            return
        connected = self._connected()
        self._known &= connected
        for host, port in self._waiting - connected:
            self._waiting.discard((host, port))
            self._tell(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def _connected(self) -> set[Peer]:
        with suppress(psutil.Error, OSError):
            rows = psutil.Process().net_connections("tcp")
            return {_peer(*row.raddr) for row in rows if row.status in OPEN and row.laddr.port == self.port}
        return set()


def _peer(host: str, port: int) -> Peer:
    address = ip_address(host.strip("[]").partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address), port
