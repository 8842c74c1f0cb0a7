"""What a ClientApp carries: frames in arrays, and the word of a site that cannot begin."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from frames import REQUEST, frame
from loop_grid import Online
from parablock.engine.flower.courier import client_app, pack, unpack
from parablock.engine.flower.exchange import (
    PROTOCOL,
    error_of,
    header_of,
    reply_of,
)
from parablock.errors import InputError


@given(contents=st.lists(st.binary(max_size=9), max_size=12), array_bytes=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_frames_travel_in_arrays_that_are_as_long_as_wanted(contents: list[bytes], array_bytes: int):
    frames = tuple(frame(message, content) for message, content in enumerate(contents))
    record = pack(replace(REQUEST, frames=frames), array_bytes)
    lengths = [len(array.data) for array in record.array_records.get("frames", {}).values()]
    array_bytes += array_bytes // 4  # two chunks of 4 MiB and their headers go together into 8 MiB
    longest = max([array_bytes, *map(len, contents)])
    assert all(0 < length <= longest for length in lengths)
    assert all(sum(pair) > array_bytes for pair in pairwise(lengths))
    assert unpack(record) == (header_of(replace(REQUEST, frames=frames)), contents)


@pytest.mark.parametrize("fault", ["of the site", "of the server"])
def test_a_clientapp_that_cannot_begin_says_why(tmp_path: Path, fault: str):
    def site_of(_: Context) -> tuple[int, Path, list[str]]:
        if fault == "of the site":
            raise InputError("the site's file is not there")
        return 0, tmp_path, []

    Online()  # Flower's messages want to know in whose name they are made
    record = pack(REQUEST, 1)
    if fault == "of the server":
        record["said"] = ConfigRecord(
            {"header": header_of(REQUEST).replace(f'"protocol": {PROTOCOL}', '"protocol": 2')}
        )
    message = Message(record, dst_node_id=1, message_type="train")
    answer = client_app(site_of)(message, Context(1, 1, {}, RecordDict(), {}))
    word = {"of the site": "the site's file is not there", "of the server": "it speaks protocol 2"}[fault]
    assert word in error_of("client 0", reply_of(*unpack(answer.content)).error).what
