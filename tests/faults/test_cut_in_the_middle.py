"""A transfer of several chunks that is cut, or given up, in its middle: up, down, streamed, with few bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines import Followed, follow, server_plan
from parablock.algorithm.parablock import same
from parablock.clock import VirtualClock
from parablock.engine.faults import Fault, Faults
from parablock.engine.update_form import Differences
from parablock.trace import Trace
from parablock.wire.quantize import CHUNK_PIECE, Encoding
from parablock.wire.transport import Link
from toy import Walker

SIZE, ROUNDS, SIX_MINUTES = 5 * CHUNK_PIECE + 77, 6, 360.0
CHUNK_BYTES = 4 * CHUNK_PIECE
WHOLE, STREAMED = Encoding("float32"), Encoding("float32", chunk_bytes=CHUNK_BYTES)
HEADER_BYTES = 400


def run(*faults: Fault, encoding: Encoding = STREAMED, delay: int = 1, stall_timeout_s: float = 600.0) -> Followed:
    plan = server_plan(3, ROUNDS, delay, Differences(encoding), stall_timeout_s=stall_timeout_s, aggregation_s=0.0)
    params, trainers = [torch.linspace(-1, 1, SIZE) for _ in range(3)], [Walker(i, 1.0) for i in range(3)]
    return follow(params, trainers, plan, Trace(VirtualClock()), link=Link(2.0, 2.0), faults=Faults(faults))


def moved(ran: Followed, way: str) -> int:
    return sum(getattr(traffic, f"{way}link_bytes") for traffic in ran.traffic)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_link_cut_for_six_minutes_costs_six_minutes_and_at_most_one_chunk(way: str, delay: int):
    undisturbed, cut = run(delay=delay), run(Fault(1, 3, f"{way}load", "drop", SIX_MINUTES), delay=delay)
    assert same(cut.result.server.params, undisturbed.result.server.params)
    assert cut.counted == undisturbed.counted == [[0, 1, 2]] * ROUNDS
    again = moved(cut, way) - moved(undisturbed, way)
    assert 0 < again <= CHUNK_BYTES + HEADER_BYTES < 4 * SIZE / 2
    assert SIX_MINUTES - 2 < cut.seconds - undisturbed.seconds < SIX_MINUTES + 2
    assert not cut.events


def test_a_link_that_is_down_for_longer_than_the_patience_ends_its_client_by_name_and_the_run_goes_on():
    ran = run(Fault(1, 3, "upload", "drop", SIX_MINUTES), stall_timeout_s=100.0)
    assert ran.counted[3:] == [[0, 2]] * 3
    told = "\n".join(ran.events)
    assert "client 1 gave up: client 1 was uploading its Update (round 4, block" in told
    assert "chunk 4 of 6)" in told and "nothing of it has arrived for 100 s" in told
    assert "round 4 goes on without client 1: 3 of 6 chunks, 196608 bytes" in told


LOSSY = {
    "exact": WHOLE,
    "int4, rounded at random": Encoding("int4", "stochastic"),
    "int8, with feedback": Encoding("int8", error_feedback=True),
}


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("delay", [0, 1])
def test_an_update_given_up_in_its_middle_counts_nowhere_although_chunks_of_it_were_folded(name: str, delay: int):
    """Its first chunks were folded and the new values streamed; then all begins again without it."""
    given_up = Fault(1, 3, "upload", "drop")
    chunk_bytes = CHUNK_PIECE * (4 if name == "exact" else 1)
    streamed = run(given_up, encoding=replace(LOSSY[name], chunk_bytes=chunk_bytes), delay=delay)
    whole = run(given_up, encoding=LOSSY[name], delay=delay)
    assert streamed.counted == whole.counted
    assert streamed.counted[3] == [0, 2]
    assert same(streamed.result.server.params, whole.result.server.params)
    assert same(streamed.result.server.view, whole.result.server.view)
    assert all(same(client.base, streamed.result.server.view) for client in streamed.result.clients)
    undisturbed = run(encoding=LOSSY[name], delay=delay)
    assert not same(streamed.result.server.params, undisturbed.result.server.params)


@pytest.mark.parametrize("at", ["train", "upload", "download", "commit"])
def test_a_machine_that_dies_amid_chunks_and_is_back_changes_nothing_but_time(at: str):
    undisturbed, ran = run(), run(Fault(1, 3, at, "kill", 30.0))
    assert "client 1 is back" in "\n".join(ran.events)
    assert ran.counted == undisturbed.counted
    assert same(ran.result.server.params, undisturbed.result.server.params)
    assert all(same(client.base, ran.result.server.view) for client in ran.result.clients)
    assert 10 < ran.seconds - undisturbed.seconds < 60
