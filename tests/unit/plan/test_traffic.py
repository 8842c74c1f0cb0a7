"""Bytes of a run by arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from parablock.plan.itinerary import walk
from parablock.plan.traffic import Sizes, total_bytes
from planning import config_of


@pytest.mark.parametrize(
    ("wire_format", "payload"),
    [
        ("float32", 4 * 1000),
        ("bfloat16", 2 * 1000),
        ("int8", 1000 + 2 * 4),  # scales of ⌈1000/256⌉ groups
        ("int4", 500 + 2 * 16),  # scales of ⌈1000/64⌉ groups
    ],
)
def test_a_message_has_its_payload_and_a_header_of_a_few_hundred_bytes(wire_format: str, payload: int) -> None:
    sizes = Sizes([1000], dtype="float32", wire_format=wire_format, chunk_bytes=None)
    assert 100 < sizes.update(0).total_bytes - payload < 400
    assert 100 < sizes.round_start(((0, "fresh"),)) - payload < 400
    assert sizes.round_start(((0, "missed"),)) > 4000  # who missed a visit gets the value itself
    assert sizes.round_start(((0, "streamed"),)) < 400


def test_a_streamed_block_travels_in_chunks_and_the_last_is_smaller() -> None:
    elements = 3 * 16384 + 5
    whole = Sizes([elements], dtype="float32", wire_format="float32", chunk_bytes=None).update(0)
    cut = Sizes([elements], dtype="float32", wire_format="float32", chunk_bytes=65536).update(0)
    assert (whole.num_chunks, cut.num_chunks) == (1, 4)
    assert 65536 < cut.chunk_bytes < 65536 + 400 and 20 < cut.last_bytes < 20 + 400
    headers = 4 * (cut.chunk_bytes - 65536)
    assert cut.total_bytes == pytest.approx(4 * elements + headers, abs=20)


def test_half_a_cohort_uploads_half_and_catches_up_on_the_way_down() -> None:
    def of(participation: float) -> Any:
        federation = {"num_clients": 4, "num_rounds": 12, "delay": 0, "participation": participation}
        itinerary = walk(config_of(federation=federation), 4, delay=0)
        sizes = Sizes([1000] * 4, dtype="float32", wire_format="float32", chunk_bytes=4_194_304)
        return total_bytes(itinerary, sizes)

    everybody, half = of(1.0), of(0.5)
    assert (everybody.num_visits, half.num_visits) == (48, 24)
    assert half.uplink_bytes == everybody.uplink_bytes / 2
    assert half.downlink_bytes > 0.6 * everybody.downlink_bytes
