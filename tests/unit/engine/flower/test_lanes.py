"""How much an exchange with a site carries, how long it may take, and when the next one is due."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from frames import OPENING, frame
from parablock.engine.flower.exchange import (
    Reply,
)
from parablock.engine.flower.lanes import Lane, Site, Speed, UnderWay, site_among
from parablock.engine.flower.stream import START, Place


def test_frames_are_as_long_as_the_link_is_worth():
    sizes = [Speed(bytes_per_s).frame_bytes for bytes_per_s in (0, 0.5e6, 4e6, 25e6)]
    assert sizes == [1 << 20, 1 << 20, 2_000_000, 8 << 20]
    site, lane = Site(up=Speed(4e6), down=Speed(3e6)), Lane("both", 1)
    site.out.put(bytes(7_000_000), 0)
    request = site.ask(lane, OPENING, 0.0)
    assert request.frame_bytes == 2_000_000
    assert [len(frame.content) for frame in request.frames] == [1_400_000] * 5


def test_where_a_reply_filled_what_it_may_carry_the_next_may_take_as_long_as_that_much_does():
    site, lane = Site(up=Speed(bytes_per_s=0.5e6, largest=8 << 20)), Lane("both", 1, held_s=0.0)
    # 30 MB at a third of 0.5 MB/s are 180 s; 8 MiB, the most that came so far, are 50.3 s; 30 s for all else
    lane.was_full = True
    site.ask(lane, OPENING, 5.0)
    assert lane.overdue_s == pytest.approx(5 + 30 + 180)
    lane.under_way.clear()
    lane.was_full = False
    site.ask(lane, OPENING, 0.0)
    assert lane.overdue_s == pytest.approx(30 + 3 * (8 << 20) / 0.5e6)


def test_what_goes_down_at_once_is_what_the_link_carries_in_a_minute_or_less_where_the_other_way_goes_on():
    sizes = {}
    for carries in ("both", "down"):
        site, lane = Site(), Lane(carries, 1)
        site.out.put(bytes(400 << 20), 0)
        first = site.ask(lane, OPENING, 0.0)
        brought = sum(len(frame.content) for frame in first.frames)
        assert brought == 8 << 20  # nothing is known of the link
        reply = Reply(0, wanted=first.frames[-1].next_place)
        times = (0.0, arrived := 5.0 + brought / 2**19, arrived, arrived)  # half a MiB/s
        site.note(lane, lane.under_way.pop(), reply, [], times)
        site.out.acknowledge(reply.wanted)
        sizes[carries] = sum(len(frame.content) for frame in site.ask(lane, OPENING, 0.0).frames) >> 20
    assert sizes == {"both": 30, "down": 15}
    assert Site(up=Speed(1 << 20)).ask(Lane("up", 1), OPENING, 0.0).budget_bytes == 30 << 20


def exchange(site: Site, lane: Lane) -> list[tuple[str, int, bool]]:
    """Ask as often as a lane is due; say of each what it carries, what it follows and whether it waits."""
    found = []
    while site.is_due(lane, is_missed=True):
        asked = site.ask(lane, OPENING, 0.0)
        found.append((asked.carries, asked.follows, asked.wait_s > 0))
    return found


def answer(site: Site, lane: Lane, size: int, round_index: int = 0) -> None:
    came = [replace(frame(0, bytes(size)), round_index=round_index)]
    site.note(lane, lane.under_way[0], Reply(0, wanted=lane.under_way[0].until), came, (0.0, 1.0, 1.0, 2.0))
    site.out.acknowledge(lane.under_way[0].until)
    lane.end(lane.under_way[0], is_lost=False)


def test_a_large_update_takes_two_exchanges_and_what_is_ready_comes_down_behind_the_second():
    site, lane = Site(down=Speed(1 << 20)), Lane("both", 1)
    assert exchange(site, lane) == [("both", 0, True)]  # nothing is known of the updates
    answer(site, lane, 30 << 20)
    assert exchange(site, lane) == [("both", 0, True), ("both", 2, False)]
    first, second = lane.under_way
    assert (first.asked_bytes, second.asked_bytes) == (18 << 20, 50 << 20)
    answer(site, lane, 18 << 20, 1)
    assert exchange(site, lane) == []  # the second will bring the rest
    site.out.put(bytes(1 << 20), 1)
    assert exchange(site, lane) == []  # which is not worth an exchange of its own
    site.out.put(bytes(8 << 20), 1)
    assert exchange(site, lane) == [("down", 3, False)]
    assert lane.under_way[1].until == Place(2)
    answer(site, lane, 12 << 20, 1)
    site.out.put(bytes(8 << 20), 1)
    assert exchange(site, lane) == [("both", 4, True)]
    site.out.put(bytes(20 << 20), 1)
    answer(site, lane, 0, 1)
    assert exchange(site, lane) == [("both", 5, False)]  # takes the rest of an update, and brings what there is
    assert lane.under_way[1].until == Place(4)


def test_a_small_update_takes_one_exchange_and_a_lane_down_never_waits():
    site, lane, down = Site(down=Speed(1 << 20)), Lane("both", 1), Lane("down", 2)
    exchange(site, lane)
    answer(site, lane, 8 << 20)
    assert exchange(site, lane) == [("both", 0, True)]
    site.out.put(bytes(8 << 20), 1)
    assert exchange(site, lane) == []  # the site may wait for its trainer for a minute
    assert exchange(site, down) == [("down", 0, False)]
    site.out.put(bytes(9 << 20), 1)
    assert exchange(site, down) == [("down", 1, False)]
    site.out.put(bytes(9 << 20), 1)
    assert exchange(site, down) == []


def test_after_a_loss_nothing_follows_until_all_is_answered():
    site, lane = Site(), Lane("both", 1)
    exchange(site, lane)
    answer(site, lane, 30 << 20)
    assert len(exchange(site, lane)) == 2
    lane.end(lane.under_way[0], is_lost=True)
    lane.more = True
    site.out.put(bytes(9 << 20), 1)  # which would be worth an exchange
    assert exchange(site, lane) == []
    lane.end(lane.under_way[0], is_lost=False)
    assert exchange(site, lane) == [("both", 0, True), ("both", 4, False)]
    lane.give_up()
    assert exchange(site, lane) == [("both", 0, True)]  # in doubt, one
    lane.end(UnderWay(1, 0, 0.0, 0.0, True, True, 0, START), is_lost=True)  # one that was given up: too late
    assert len(lane.under_way) == 1 and not lane.is_broken


def test_one_that_follows_may_take_as_long_as_one_alone_from_when_its_supernode_came_to_it():
    site, lane = Site(up=Speed(1 << 20, 8 << 20)), Lane("both", 1, held_s=0.0)
    assert lane.overdue_s == inf
    exchange(site, lane)
    answer(site, lane, 30 << 20)
    assert len(exchange(site, lane)) == 2
    first, second = lane.under_way
    assert lane.overdue_s == first.patience_s > 0
    lane.end(first, is_lost=False)
    lane.free_s = 500.0  # longer than both together might have taken from when they were asked for
    assert lane.overdue_s == 500.0 + second.patience_s > first.patience_s + second.patience_s
    lane.free_s = 1.0
    assert lane.overdue_s == 1.0 + second.patience_s  # and not what the first has left over, too


def test_an_upward_lane_brings_nothing_and_is_asked_when_it_is_missed():
    site, up, down = Site(), Lane("up", 1), Lane("down", 2)
    site.out.put(b"x", 0)
    assert [site.is_due(lane, is_missed=False) for lane in (up, down)] == [False, True]
    assert [site.is_due(lane, is_missed=True) for lane in (up, down)] == [True, True]
    assert [len(site.ask(lane, OPENING, 0.0).frames) for lane in (up, down)] == [0, 1]
    assert [site.is_due(lane, is_missed=True) for lane in (up, down)] == [False, False]  # they are on their way


def test_a_supernode_that_comes_back_takes_its_place_and_a_second_one_does_not():
    site = Site()
    assert site.take_lane("up", 1) and not site.is_complete
    assert site.take_lane("down", 2) and site.is_complete
    assert not site.take_lane("up", 3)
    assert not site.take_lane("both", 3)
    site.lanes["up"].offline = True
    assert not site.take_lane("both", 3)  # the other direction still has one
    assert site.take_lane("up", 3) and site.lanes["up"].node_id == 3
    for lane in site.lanes.values():
        lane.offline = True
    assert site.take_lane("both", 4) and list(site.lanes) == ["both"]


def test_what_all_replies_together_may_carry_does_not_grow_with_the_sites():
    for num_sites, together in ((1, 50 << 20), (2, 100 << 20), (4, 100 << 20), (1000, 1000 * (8 << 20))):
        sites = [site_among(num_sites) for _ in range(num_sites)]
        budgets = []
        for site in sites:
            assert site.ask(Lane("up", 1), OPENING, 0.0).budget_bytes == 8 << 20, "its speed is not known yet"
            site.up.note(1 << 30, 1.0)
            budgets.append(site.ask(Lane("up", 1), OPENING, 0.0).budget_bytes)
        assert sum(budgets) == together


def test_an_exchange_that_was_made_again_tells_nothing_of_the_link():
    part = frame(0, bytes(1 << 20))
    for silent, speed in ((False, 1 << 20), (True, 0.0)):
        site, lane = Site(), Lane("both", 1, silent=silent)
        site.ask(lane, OPENING, 0.0)
        site.note(lane, lane.under_way.pop(), Reply(0), [part], (0.0, 1.0, 1.0, 2.0))
        assert site.up.bytes_per_s == speed


def test_an_exchange_that_is_made_again_in_doubt_carries_a_frame_each_way():
    site, lane = Site(up=Speed(4e5), down=Speed(6e6)), Lane("both", 1)
    site.out.put(bytes(30_000_000), 0)
    carried = []
    for lane.doubted in (False, True, False):
        request = site.ask(lane, OPENING, 0.0)
        carried.append((sum(len(part.content) for part in request.frames), request.budget_bytes))
        lane.under_way.clear()
    assert carried == [(30_000_000, 24_000_000), (3_000_000, 1 << 20), (30_000_000, 24_000_000)]
    lane.doubted = True
    site.ask(lane, OPENING, 0.0)
    (asked,) = lane.under_way
    site.note(lane, asked, Reply(0), [frame(0, bytes(1 << 20))], (0.0, 1.0, 1.0, 2.0))
    assert not lane.was_full  # it brought all that was asked for, which tells nothing of what is left
    lane.doubted = False
    site.note(lane, asked, Reply(0), [frame(0, bytes(1 << 20))], (0.0, 1.0, 1.0, 2.0))
    assert lane.was_full


def test_a_small_reply_does_not_make_the_next_large_one_overdue():
    site, lane = Site(up=Speed(1 << 20)), Lane("up", 1)
    site.ask(lane, OPENING, 0.0)
    patience = []
    for size in (4 << 20, 10):
        site.note(lane, lane.under_way.pop(), Reply(0), [frame(0, bytes(size))], (0.0, 1.0, 1.0, 5.0))
        site.ask(lane, OPENING, 0.0)
        patience.append(lane.overdue_s)
    assert patience[1] >= patience[0]
    larger = [frame(0, bytes(6 << 20))]
    site.note(lane, lane.under_way.pop(), Reply(0), larger, (0.0, 1.0, 1.0, 7.0))  # as fast, and more
    site.ask(lane, OPENING, 0.0)
    assert lane.overdue_s > patience[0]
