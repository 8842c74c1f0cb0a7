from __future__ import annotations

import threading

import pytest

from parablock.clock import Clock, RealClock, VirtualClock
from parablock.engine.pipeline import Machines, Pipeline
from parablock.errors import CodecError
from parablock.trace import Trace
from parablock.wire.transport import Link, MemoryTransport, Parcel

CLOCKS = [RealClock, VirtualClock]


def pipeline(clock: Clock, transport, **options) -> Pipeline:
    return Pipeline(0, transport, Trace(clock), stall_timeout_s=options.get("stall_timeout_s", 5.0))


def test_a_thread_that_stays_is_seen(threads_left):
    stay = threading.Event()
    thread = threading.Thread(target=stay.wait)
    thread.start()
    assert threads_left() == {thread}
    stay.set()
    thread.join()
    assert not threads_left()


@pytest.mark.parametrize("make", CLOCKS)
def test_sending_does_not_wait_and_leaving_sends_what_is_left(make, threads_left):
    clock = make()
    transport = MemoryTransport(clock, Link(upload_mbps=0.08), 1)  # 10,000 byte/s
    with pipeline(clock, transport) as lane:
        lane.send(b"x" * 1000, 0)
        lane.send(b"y" * 1000, 1)
        assert clock.now() < 0.1
    assert clock.now() >= 0.2
    assert [transport.receive(1.0, "it") for _ in range(2)] == [(0, b"x" * 1000), (0, b"y" * 1000)]
    assert not threads_left()


@pytest.mark.parametrize("make", CLOCKS)
def test_an_error_of_the_communication_thread_surfaces_in_the_compute_thread(make, threads_left):
    class Broken(MemoryTransport):
        def finish_upload(self, client_id: int, parcel: Parcel, seconds: float) -> None:
            raise CodecError("the cable is cut")

    clock = make()
    with pytest.raises(CodecError, match="cable"), pipeline(clock, Broken(clock, Link(), 1)) as lane:
        lane.send(b"update", 0)
        lane.receive()
    assert not threads_left()


@pytest.mark.parametrize("make", CLOCKS)
def test_an_error_of_the_compute_thread_leaves_no_thread_and_does_not_wait_for_the_link(make, threads_left):
    clock = make()
    transport = MemoryTransport(clock, Link(upload_mbps=0.08), 1)
    with pytest.raises(ZeroDivisionError), pipeline(clock, transport) as lane:
        for t in range(100):
            lane.send(b"x" * 1000, t)  # 10 s of uploads
        raise ZeroDivisionError
    assert clock.now() < 1.0
    assert not threads_left()


@pytest.mark.parametrize("make", CLOCKS)
def test_a_machine_that_fails_ends_the_others_and_its_error_reaches_the_server(make, threads_left):
    clock = make()
    transport = MemoryTransport(clock, Link(), 2)

    def failing() -> None:
        clock.sleep(0.01)
        raise CodecError("client 0 broke")

    def waiting() -> None:
        clock.mailbox().get(100.0, "for ever")

    with (
        pytest.raises(CodecError, match="client 0 broke"),
        Machines(clock, [failing, waiting], transport.fail, stall_timeout_s=5.0),
    ):
        transport.receive(100.0, "an update")
    assert not threads_left()


@pytest.mark.parametrize("make", CLOCKS)
def test_a_server_that_fails_ends_its_clients(make, threads_left):
    clock = make()
    transport = MemoryTransport(clock, Link(), 2)

    def client(client_id: int) -> None:
        with Pipeline(client_id, transport, Trace(clock), stall_timeout_s=100.0) as lane:
            lane.receive()

    with (
        pytest.raises(ZeroDivisionError),
        Machines(clock, [lambda: client(0), lambda: client(1)], transport.fail, stall_timeout_s=5.0),
    ):
        clock.sleep(0.01)
        raise ZeroDivisionError
    assert not threads_left()


@pytest.mark.parametrize("make", CLOCKS)
def test_a_client_that_fails_when_the_server_is_done_is_not_silent(make):
    clock = make()
    transport = MemoryTransport(clock, Link(), 1)

    def failing_late() -> None:
        clock.sleep(0.05)
        raise CodecError("the last message was altered")

    with (
        pytest.raises(CodecError, match="last message"),
        Machines(clock, [failing_late], transport.fail, stall_timeout_s=5.0),
    ):
        pass
    with Machines(make(), [lambda: None], transport.fail, stall_timeout_s=5.0):
        pass
