"""Links of a bandwidth and a latency, and the traffic that is counted over them."""

from __future__ import annotations

import pytest

from parablock.clock import RealClock
from parablock.wire.transport import Link, MemoryTransport, Parcel


def test_bytes_and_seconds_are_counted_by_round_client_and_direction():
    transport = MemoryTransport(RealClock(), Link(upload_mbps=0.8, download_mbps=1.6, latency_s=0.01), 2)
    large = Parcel(b"x" * 1000, 3)
    up_s, down_s = transport.upload_s(large), transport.download_s(large)
    # 0.01 s + 8,000 bit / 0.8 Mbit/s = 0.02 s; 0.01 + 0.005 s
    assert (up_s, down_s) == (pytest.approx(0.02), pytest.approx(0.015))
    transport.finish_upload(0, large, up_s)
    transport.finish_download(0, large, down_s)
    transport.finish_upload(1, Parcel(b"x" * 500, 4), 0.015)
    third, fourth = transport.ledger.of_round(3), transport.ledger.of_round(4)
    assert (third.uplink_bytes, third.downlink_bytes) == (1000, 1000)
    assert (fourth.uplink_bytes, fourth.downlink_bytes) == (500, 0)
    assert third.seconds(0) == pytest.approx(0.035)
    assert third.seconds(1) == 0.0
    assert transport.ledger.of_round(99).uplink_bytes == 0


def test_link_arithmetic():
    link = Link(upload_mbps=8, download_mbps=80, latency_s=0.5)
    assert link.upload_s(1_000_000) == 1.5
    assert link.download_s(1_000_000) == 0.6
    assert Link().upload_s(10**12) == 0.0
