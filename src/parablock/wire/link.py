"""The link between a client and the server: how long bytes take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Bandwidth and latency of one client's link.

    Attributes:
        upload_mbps: Client to server, 10^6 bit/s; None is unlimited.
        download_mbps: Server to client, 10^6 bit/s; None is unlimited.
        latency_s: One way, seconds.
    """

    upload_mbps: float | None = None
    download_mbps: float | None = None
    latency_s: float = 0.0

    def upload_s(self, wire_bytes: int) -> float:
        """Seconds that this many bytes take up."""
        return self.latency_s + _seconds(wire_bytes, self.upload_mbps)

    def download_s(self, wire_bytes: int) -> float:
        """Seconds that this many bytes take down."""
        return self.latency_s + _seconds(wire_bytes, self.download_mbps)


def _seconds(wire_bytes: int, mbps: float | None) -> float:
    return 0.0 if mbps is None else wire_bytes * 8 / (mbps * 1e6)
