from __future__ import annotations

import pytest

from parablock.clock import VirtualClock
from parablock.engine.inprocess import Hooks, run_in_process
from parablock.engine.server import ServerPlan
from parablock.engine.steps import FillTheWait, FixedSteps
from parablock.trace import Trace
from parablock.wire.link import Link
from parablock.wire.quantize import Encoding
from toy import ToyTrainer, initial

MEGABYTE = 1_000_000


def test_k_is_what_computes_for_as_long_as_the_exchange():
    # 1 MB at 8 Mbit/s is 1 s each way; steps of 0.25 s: 2 s / 0.25 s = 8, or 4 where both ways run at once
    rule = FillTheWait(Link(8.0, 8.0), least=1, most=64)
    assert rule.of_round({0: 0.25}, MEGABYTE, streamed=False) == 8
    assert rule.of_round({0: 0.25}, MEGABYTE, streamed=True) == 4
    assert rule.of_round({0: 0.25, 1: 0.5}, MEGABYTE, streamed=False) == 8, "the fastest must not idle"
    assert rule.of_round({0: 0.3}, MEGABYTE, streamed=False) == 7, "rounded up"


def test_k_keeps_its_bounds_and_begins_at_the_lower_one():
    rule = FillTheWait(Link(8.0, 8.0), least=3, most=5)
    assert rule.of_round({}, MEGABYTE, streamed=False) == 3
    assert rule.of_round({0: 0.01}, MEGABYTE, streamed=False) == 5
    assert rule.of_round({0: 10.0}, MEGABYTE, streamed=False) == 3
    assert FillTheWait(Link(), 3, 5).of_round({0: 0.01}, MEGABYTE, streamed=False) == 3, "an unlimited link"
    assert FixedSteps(7).of_round({0: 0.01}, MEGABYTE, streamed=False) == 7


def rounds_of(link: Link) -> tuple[list[int], float]:
    clock, asked = VirtualClock(), []
    encoding, rule = Encoding("float32"), FillTheWait(link, least=1, most=20)
    plan = ServerPlan(3, 10, 1, "cyclic", 1.0, 0, encoding, rule, 20.0, 0, aggregation_s=0.0)
    trainers = [ToyTrainer(i, 1, step_time_s) for i, step_time_s in enumerate((1.0, 2.0, 4.0))]
    hooks = Hooks(lambda state, updates, traffic: asked.append(updates[0].num_local_steps), lambda state: None)
    result = run_in_process(initial(4), trainers, plan, Trace(clock), hooks, link=link, in_flight="aligned")
    assert list(result.server.local_steps) == asked
    return asked, clock.now()


def test_the_engine_fills_the_wait_and_does_it_the_same_way_every_time():
    # a block of five elements: 20 bytes; 5 s each way at 32 bit/s, 10 s in all, ten steps of the fastest client
    link = Link(32e-6, 32e-6)
    asked, seconds = rounds_of(link)
    assert asked[:2] == [1, 1], "nothing has been measured when the first rounds start"
    assert asked[2:] == [10] * 8
    assert rounds_of(link) == (asked, seconds)
    assert rounds_of(Link())[0] == [1] * 10


@pytest.mark.parametrize("least", [2, 6])
def test_the_lower_bound_is_a_bound(least):
    assert FillTheWait(Link(), least, 8).of_round({0: 1.0}, MEGABYTE, streamed=False) == least
