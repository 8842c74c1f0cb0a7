"""Links between a server and sites on this machine: network namespaces, shaped by `tc tbf`, cut and counted."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

LARGE = 1 << 18
"""Bytes from which on a request or an answer carries a part of a block."""

PIECE = 1 << 16


@dataclass(frozen=True)
class Link:
    """A site's network: the server's end in our namespace, the site's end in one of its own.

    Attributes:
        lane: Which of several deployments at once.
        site: The site's number.
        up_mbps: Speed from the site to the server, 10^6 bit/s; 0: as fast as it goes.
        down_mbps: Speed back.
    """

    lane: int
    site: int
    up_mbps: float
    down_mbps: float

    @property
    def namespace(self) -> str:
        return f"parablock{self.lane}-{self.site}"

    @property
    def outer(self) -> str:
        return f"pbo{self.lane}-{self.site}"

    @property
    def gateway(self) -> str:
        """The server's address on this link."""
        return f"10.77.{8 * self.lane + self.site}.1"

    @property
    def inside(self) -> list[str]:
        """What a command begins with that runs at the site."""
        return ["ip", "netns", "exec", self.namespace]

    def lay(self, stack: ExitStack) -> None:
        """Make the link; it goes with the stack."""
        inner, address = f"pbi{self.lane}-{self.site}", self.gateway.removesuffix("1") + "2"
        _call("ip", "netns", "add", self.namespace)
        stack.callback(_call, "ip", "netns", "del", self.namespace)
        _call("ip", "link", "add", self.outer, "type", "veth", "peer", "name", inner)
        stack.callback(_call, "ip", "link", "del", self.outer)  # at once; with the namespace it goes when it likes
        _call("ip", "link", "set", inner, "netns", self.namespace)
        _call("ip", "addr", "add", f"{self.gateway}/24", "dev", self.outer)
        _call("ip", "link", "set", self.outer, "up")
        _call(*self.inside, "ip", "addr", "add", f"{address}/24", "dev", inner)
        _call(*self.inside, "ip", "link", "set", inner, "up")
        _call(*self.inside, "ip", "link", "set", "lo", "up")
        if self.down_mbps:
            _call("tc", "qdisc", "add", "dev", self.outer, *_shape(self.down_mbps))
        if self.up_mbps:
            _call(*self.inside, "tc", "qdisc", "add", "dev", inner, *_shape(self.up_mbps))

    def cut(self, seconds: float) -> None:
        """Take the link down for so long."""
        _call("ip", "link", "set", self.outer, "down")
        time.sleep(seconds)
        _call("ip", "link", "set", self.outer, "up")

    def moved(self) -> tuple[int, int]:
        """Give the bytes that went up and down so far, headers and all."""
        counts = Path("/sys/class/net") / self.outer / "statistics"
        up, down = (int((counts / name).read_text()) for name in ("rx_bytes", "tx_bytes"))
        return up, down


class Swallower:
    """Stands before a server and can lose the answer to a large request, or break off a large answer.

    Args:
        host: The address to listen at.
        target: The server's port on this machine.
    """

    def __init__(self, host: str, target: int) -> None:
        self._target, self.swallowed, self._direction = target, 0, ""
        self._listener = socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow_next(self, direction: str) -> None:
        """Lose the next answer: to a large request that goes `up`, or a large one that goes `down`."""
        self._direction = direction

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                site, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                since = {"up": 0, "down": 0}
                for ends, direction in (((site, server), "up"), ((server, site), "down")):
                    threading.Thread(target=self._pump, args=(*ends, since, direction), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, since: dict[str, int], direction: str) -> None:
        other = "down" if direction == "up" else "up"
        with suppress(OSError):
            while piece := source.recv(PIECE):
                if direction == "down" and self._direction and since[self._direction] > LARGE:
                    self._direction = ""
                    self.swallowed += 1
                    break
                since[direction] += len(piece)
                since[other] = 0
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _shape(mbps: float) -> list[str]:
    return ["root", "tbf", "rate", f"{mbps:g}mbit", "burst", "256kb", "latency", "200ms"]


def _call(*command: str) -> None:
    subprocess.run(command, check=True)
