"""The server over Flower: SuperNodes that come and go."""

from __future__ import annotations

import pytest

from frames import OPENING
from loop_grid import Online
from parablock.clock import RealClock
from parablock.engine.flower import grid
from parablock.engine.flower.exchange import Reply
from parablock.errors import InputError
from parablock.trace import Trace


def test_a_site_that_starts_again_without_keys_does_not_end_the_run():
    told, online = list[str](), Online()
    transport = grid.GridTransport(online, 1, OPENING, epoch_s=lambda: 0.0, tell=told.append)
    transport._welcome(1, Reply(0, carries="up"))
    transport._welcome(2, Reply(0, carries="down"))
    with pytest.raises(InputError, match="two sites say that they are client 0"):
        transport._welcome(3, Reply(0, carries="down"))  # before the run somebody has made a mistake
    transport.begin(Trace(RealClock()), None)
    site = transport._sites[0]
    transport._welcome(3, Reply(0, carries="down"))  # number 2 is gone, and nobody knows it yet
    assert site.lanes["down"].node_id == 2
    assert told == ["client 0 has connected", "another SuperNode says that it is client 0; its place is taken"]
    site.lanes["up"].offline = True
    online.nodes = {1}
    transport._look_for_the_lost()
    assert [site.lanes[carries].offline for carries in ("up", "down")] == [False, True]
    transport._welcome(3, Reply(0, carries="down"))
    assert site.lanes["down"].node_id == 3 and transport.is_there(0)
