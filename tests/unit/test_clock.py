from __future__ import annotations

import threading

import pytest

from parablock.clock import Clock, RealClock, Stopped, VirtualClock
from parablock.errors import StallError


def start(clock: Clock, body) -> threading.Thread:
    ticket = clock.expect()

    def run() -> None:
        try:
            with clock.taking_part(ticket):
                body()
        except Stopped:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_virtual_sleeps_overlap_and_cost_no_real_time():
    clock = VirtualClock()
    done, order = clock.mailbox(), []

    def sleeper(name: str, seconds: float) -> None:
        clock.sleep(seconds)
        order.append((name, clock.now()))
        done.put(None)

    start(clock, lambda: sleeper("slow", 3000.0))
    start(clock, lambda: sleeper("fast", 1000.0))
    for _ in range(2):
        done.get(1.0, "sleepers")
    assert order == [("fast", 1000.0), ("slow", 3000.0)]
    assert clock.now() == 3000.0


def test_virtual_events_of_equal_time_run_in_the_order_they_were_asked_for():
    def order() -> list[int]:
        clock = VirtualClock()
        done, seen = clock.mailbox(), []

        def body(number: int) -> None:
            for _ in range(3):
                clock.sleep(1.0)
                seen.append(number)
            done.put(None)

        for number in range(5):
            start(clock, lambda number=number: body(number))
        for _ in range(5):
            done.get(1.0, "bodies")
        return seen

    assert order() == order() == [0, 1, 2, 3, 4] * 3


def test_virtual_work_takes_what_it_is_said_to_take_or_what_it_took():
    clock = VirtualClock()
    with clock.working(7.0):
        pass
    assert clock.now() == 7.0
    with clock.working():
        sum(range(10_000))
    assert clock.now() > 7.0


def test_a_virtual_world_in_which_nothing_can_move_says_so_at_once():
    clock = VirtualClock()
    with pytest.raises(StallError, match="a letter that nobody writes"):
        clock.mailbox().get(1e9, "a letter that nobody writes")


def test_a_virtual_stall_reaches_every_waiting_thread():
    clock = VirtualClock()
    errors: list[str] = []

    def wait(name: str) -> None:
        try:
            clock.mailbox().get(1.0, name)
        except StallError as error:
            errors.append(error.what)

    threads = [start(clock, lambda name=name: wait(name)) for name in ("one", "two")]
    with pytest.raises(StallError):
        clock.mailbox().get(1.0, "main")
    clock.leave()
    for thread in threads:
        thread.join(5.0)
    assert len(errors) == 2


def test_real_waiting_ends_when_nothing_has_moved_and_lasts_while_something_does():
    clock = RealClock()
    box = clock.mailbox()
    with pytest.raises(StallError, match=r"0\.05 s while waiting for nothing"):
        box.get(0.05, "nothing")

    def move_then_put() -> None:
        for _ in range(6):
            clock.sleep(0.05)  # a transfer that moves
        box.put("late")

    thread = start(clock, move_then_put)
    assert box.get(0.2, "a late letter") == "late"  # 0.3 s in all: longer than the patience
    thread.join()


def test_nobody_loses_patience_with_a_real_computation():
    clock = RealClock()
    box, release = clock.mailbox(), threading.Event()

    def compute() -> None:
        with clock.working():
            release.wait(0.3)
        box.put("result")

    thread = start(clock, compute)
    assert box.get(0.1, "a result") == "result"
    thread.join()


@pytest.mark.parametrize("make", [RealClock, VirtualClock])
def test_stopping_wakes_whoever_waits_or_sleeps(make):
    clock = make()
    ended = []

    def body(wait) -> None:
        try:
            wait()
        except Stopped:
            ended.append(1)
            raise

    threads = [
        start(clock, lambda: body(lambda: clock.mailbox().get(60.0, "nothing"))),
        start(clock, lambda: body(lambda: clock.sleep(60.0))),
    ]
    clock.sleep(0.01)
    clock.stop()
    clock.leave()
    for thread in threads:
        thread.join(5.0)
    assert ended == [1, 1]


@pytest.mark.parametrize("make", [RealClock, VirtualClock])
def test_a_clock_goes_on_from_where_a_checkpoint_left_it(make):
    clock = make(start_s=100.0)
    clock.sleep(0.01)
    assert 100.01 <= clock.now() < 101
