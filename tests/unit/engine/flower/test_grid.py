"""The server over Flower: what is sent again, and SuperNodes that come and go."""

from __future__ import annotations

import pytest

from frames import OPENING
from loop_grid import Online
from parablock.clock import RealClock
from parablock.engine.flower import grid
from parablock.engine.flower.exchange import (
    Reply,
)
from parablock.engine.flower.lanes import Lane, Site
from parablock.engine.flower.stream import START
from parablock.errors import InputError
from parablock.trace import Trace


def with_a_site() -> tuple[grid.GridTransport, Site, Lane]:
    """Make the server's side of a site with one SuperNode, for which there are 12 MiB."""
    transport = grid.GridTransport(Online(), 1, OPENING, epoch_s=lambda: 0.0, tell=print)
    transport.begin(Trace(RealClock()), None)
    site = transport._sites[0]
    site.take_lane("both", 1)
    lane = site.lanes["both"]
    site.out.put(bytes(12 << 20), 0)
    return transport, site, lane


def test_of_what_a_site_lacks_only_that_is_sent_again_which_it_does_not_have_ahead():
    transport, site, lane = with_a_site()
    first, second = (site.ask(lane, OPENING, 0.0) for _ in range(2))
    assert first.frames and second.frames[0].place == first.frames[-1].next_place
    lost, other = (grid._Asked(0, lane, exchange, 0.0) for exchange in lane.under_way)
    has = Reply(0, wanted=START, ahead=second.frames[0].place)
    assert not transport._take(grid._Arrived(lost, 1.0, problem="a link broke"))
    assert lane.overdue_s == 1.0 + other.exchange.patience_s  # its SuperNode comes to the other one only now
    assert transport._take(grid._Arrived(other, 2.0, has))
    site.down.note(1 << 30, 1.0)  # all might go at once
    again = site.ask(lane, OPENING, 0.0).frames
    assert sum(len(part.content) for part in again) == sum(len(part.content) for part in first.frames)


def test_where_flower_has_lost_sight_of_a_supernode_a_frame_tells_first_what_the_site_has():
    sizes = []
    for node_is_gone in (False, True):
        transport, site, lane = with_a_site()
        for _ in range(2):
            request = site.ask(lane, OPENING, 0.0)
            sizes.append(sum(len(part.content) for part in request.frames))
            (exchange,) = lane.under_way
            lost = grid._Asked(0, lane, exchange, 0.0)
            assert not transport._take(grid._Arrived(lost, 1.0, problem="?", node_is_gone=node_is_gone))
        assert lane.offline is node_is_gone
    whole, frame_bytes = 8 << 20, 1 << 20
    assert sizes == [whole, whole, whole, frame_bytes]


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
