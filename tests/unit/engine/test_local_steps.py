from __future__ import annotations

import pytest

from engines import run_here, server_plan
from parablock.clock import VirtualClock
from parablock.config.load import parse_config
from parablock.engine.local_steps import FillTheWait, FixedSteps, LocalSteps, local_steps_of
from parablock.engine.plans import Hooks
from parablock.trace import Trace
from parablock.wire.transport import Link
from toy import ToyTrainer, initial

MEGABYTE = 1_000_000
STEP_S = (1.0, 2.0, 4.0)


def chosen(rule: LocalSteps, *step_s: float, streamed: bool = False) -> tuple[int, ...]:
    return rule.of_round(dict(enumerate(step_s)), max(1, len(step_s)), MEGABYTE, streamed=streamed)


def test_k_is_what_computes_for_as_long_as_the_exchange():
    # 1 MB at 8 Mbit/s is 1 s each way; steps of 0.25 s: 2 s / 0.25 s = 8, or 4 where both ways run at once
    rule = FillTheWait(Link(8.0, 8.0), least=1, most=64)
    assert chosen(rule, 0.25) == (8,)
    assert chosen(rule, 0.25, streamed=True) == (4,)
    assert chosen(rule, 0.3) == (7,), "rounded up"


def test_each_client_takes_the_steps_that_fit_while_the_slowest_covers_the_exchange():
    rule = FillTheWait(Link(8.0, 8.0), least=1, most=64)
    assert chosen(rule, 0.25, 0.5) == (8, 4), "both compute for the 2 s of the exchange"
    # 0.8 s of the slow one: three steps, 2.4 s; the others fill them with 9 of 0.25 s and 24 of 0.1 s
    assert chosen(rule, 0.25, 0.8, 0.1) == (9, 3, 24)
    assert chosen(FillTheWait(Link(), least=2, most=64), 0.25, 1.0) == (8, 2), (
        "no exchange to wait for: for each other"
    )
    alike = FillTheWait(Link(8.0, 8.0), least=1, most=64, alike=True)
    assert chosen(alike, 0.25, 0.8) == (8,), "what the fastest needs, for everybody"


def test_k_keeps_its_bounds_and_begins_at_the_lower_one():
    rule = FillTheWait(Link(8.0, 8.0), least=3, most=5)
    assert chosen(rule) == (3,)
    assert chosen(rule, 0.01) == (5,)
    assert chosen(rule, 10.0) == (3,)
    assert chosen(rule, 0.01, 10.0) == (5, 3)
    assert chosen(FillTheWait(Link(), 3, 5), 0.01) == (3,), "an unlimited link"
    assert rule.of_round({1: 0.5}, 3, MEGABYTE, streamed=False) == (3, 4, 3), "only client 1 has been measured"
    assert chosen(FixedSteps(7), 0.01, 5.0) == (7,)


def test_where_updates_cannot_be_evened_out_all_take_as_many_steps():
    def rule_of(**changes: object) -> LocalSteps:
        tree: dict[str, object] = {"model": {"name_or_path": "m"}, "data": {"train": "rows"}}
        return local_steps_of(parse_config({**tree, "train": {"num_local_steps": "auto"}, **changes}))

    assert chosen(rule_of(), 1.0, 2.0) == (2, 1)
    sums = {"secure_aggregation": "plain", "clip_norm": 1.0}
    masked = {"privacy": sums, "wire": {"streaming": False}}
    for changes in (masked, {"federation": {"method": "flora"}}):
        assert chosen(rule_of(**changes), 1.0, 2.0) == (1,)


def rounds_of(
    link: Link, *, most: int = 20, alike: bool = False
) -> tuple[list[tuple[int, ...]], list[float], float]:
    """The steps of each round's clients, and how long each client computed and the whole run took."""
    clock, asked = VirtualClock(), []
    rule = FillTheWait(link, least=1, most=most, alike=alike)
    plan = server_plan(3, 10, 1, schedule="cyclic", local_steps=rule, aggregation_s=0.0)
    trainers = [ToyTrainer(i, 1, step_time_s) for i, step_time_s in enumerate(STEP_S)]
    trace = Trace(clock)
    hooks = Hooks(
        lambda state, updates, traffic: asked.append(tuple(update.num_local_steps for update in updates)),
        lambda state: None,
    )
    result = run_here(initial(4), trainers, plan, trace, hooks, link=link)
    assert [row if len(row) == 3 else row * 3 for row in result.server.local_steps] == asked
    spans = [span for span in trace.spans if span.activity == "computing"]
    busy = [sum(span.duration_s for span in spans if span.client_id == i) for i in range(3)]
    return asked, busy, clock.now()


# a block of five elements: 20 bytes; 5 s each way at 32 bit/s, 10 s in all
SLOW = Link(32e-6, 32e-6)


def test_the_engine_lets_nobody_idle_and_does_it_the_same_way_every_time():
    asked, busy, seconds = rounds_of(SLOW)
    assert asked[:2] == [(1, 1, 1)] * 2, "nothing has been measured when the first rounds start"
    # three steps of 4 s cover the exchange, 12 s; the others take 12 and 6
    assert asked[2:] == [(12, 6, 3)] * 8
    assert busy[:2] == pytest.approx([busy[2] - 2 * 3, busy[2] - 2 * 2]), "all alike but for the first two rounds"
    assert rounds_of(SLOW) == (asked, busy, seconds)


def test_unequal_speeds_without_a_slow_link_fill_the_time_of_the_slowest():
    asked, busy, seconds = rounds_of(Link())
    assert asked[2:] == [(4, 2, 1)] * 8
    alike, idle, as_long = rounds_of(Link(), alike=True)
    assert alike == [(1, 1, 1)] * 10
    assert as_long == pytest.approx(seconds), "the work of the fast ones costs no time"
    assert idle[0] < 0.4 * busy[0]


@pytest.mark.parametrize("most", [2, 5])
def test_the_upper_bound_is_a_bound(most: int):
    assert rounds_of(SLOW, most=most)[0][2:] == [(most, most, min(most, 3))] * 8
