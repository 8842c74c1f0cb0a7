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
from math import inf
from urllib.parse import unquote

import psutil

PAUSE_S, PAUSE = 0.05, 20
"""Least pause between two readings of the table: seconds, and how many times as long as the last one took."""
OPEN = (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)

Peer = tuple[str, int]


class Strangers:
    """Tells of those who begin handshakes at a port and make no call; its callers may be any threads."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.port, self._tell = 0, tell
        self._waiting, self._known = set[Peer](), set[Peer]()
        self._next_s = 0.0

    def shakes_hands(self) -> None:
        """Note who is there, since a handshake begins; however many strangers come, that takes little time."""
        if (began_s := time.monotonic()) < self._next_s:
            return
        self._next_s = inf  # nobody else reads it meanwhile
        self._waiting |= (self._connected() or set()) - self._known
        ended_s = time.monotonic()
        self._next_s = ended_s + max(PAUSE_S, PAUSE * (ended_s - began_s))

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
        if connected is None:
            return
        self._known &= connected
        for host, port in self._waiting - connected:
            self._waiting.discard((host, port))
            self._tell(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def _connected(self) -> set[Peer] | None:
        """Return who is connected; None: the table cannot be read now."""
        with suppress(psutil.Error, OSError, RuntimeError):  # the last one for a line that psutil cannot read
            rows = psutil.Process().net_connections("tcp")
            return {_peer(*row.raddr) for row in rows if row.status in OPEN and row.laddr.port == self.port}
        return None


def _peer(host: str, port: int) -> Peer:
    address = ip_address(host.strip("[]").partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address), port
