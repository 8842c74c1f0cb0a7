"""A TCP proxy that is slow, can be cut, and can swallow an answer: a bad link before a real server."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

PIECE = 8192
UPLOAD = 100_000
"""Bytes up in one request from which on it is one that carries a part of an update."""


class CuttableProxy:
    """Stands at a port of its own before another one.

    Args:
        target: The port behind it, on this machine.
        bytes_per_s: Speed of each direction.
    """

    def __init__(self, target: int, bytes_per_s: float) -> None:
        self._target, self._bytes_per_s = target, bytes_per_s
        self._until = 0.0
        self._open: set[socket.socket] = set()
        self.up = self.down = self.swallowed = self.cuts = 0
        self.swallow_next = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Break all connections and leave new ones without an answer for so long."""
        self.cuts += 1
        self._until = time.monotonic() + seconds
        for end in list(self._open):
            _close(end)

    def close(self) -> None:
        """Stop for good."""
        self._listener.close()
        self.cut(0.0)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            while time.monotonic() < self._until:
                time.sleep(0.05)  # as in a hole: nobody answers
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._open |= {client, server}
            since_answer = [0]
            for source, sink, goes_up in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, since_answer, goes_up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, since_answer: list[int], goes_up: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE):
                if not goes_up and self.swallow_next and since_answer[0] > UPLOAD:
                    self.swallow_next = False
                    self.swallowed += 1
                    break
                since_answer[0] = since_answer[0] + len(piece) if goes_up else 0
                time.sleep(len(piece) / self._bytes_per_s)
                sink.sendall(piece)
                if goes_up:
                    self.up += len(piece)
                else:
                    self.down += len(piece)
        for end in (source, sink):
            _close(end)
            self._open.discard(end)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
