"""A ClientApp whose site cannot begin says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from frames import REQUEST
from loop_grid import Online
from parablock.engine.flower.courier import client_app, pack, unpack
from parablock.engine.flower.exchange import PROTOCOL, error_of, header_of, reply_of
from parablock.errors import InputError


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
