"""Spans of a trace: recorded, cut into what was hidden and what was not, written and read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.clock import VirtualClock
from parablock.report.timeline import draw_timeline
from parablock.storage.run_directory import overlap_fraction
from parablock.trace import (
    ClientTimes,
    Span,
    Trace,
    cut_transfers,
    read_chrome_trace,
    times_by_client,
    write_chrome_trace,
)


def spans() -> list[Span]:
    # client 0 computes 0–10 and 12–20, uploads 8–13 (of which 2 + 1 under computation), downloads 20–24 (none)
    return [
        Span(0, "compute", "computing", 0.0, 10.0, {"round_index": 0, "block_index": 1}),
        Span(0, "compute", "waiting", 10.0, 2.0, {}),
        Span(0, "compute", "computing", 12.0, 8.0, {"round_index": 1, "block_index": 2}),
        Span(0, "communication", "uploading", 8.0, 5.0, {"round_index": 0, "payload_bytes": 100}),
        Span(0, "communication", "downloading", 20.0, 4.0, {"round_index": 1, "payload_bytes": 100}),
        Span(None, "server", "aggregating", 13.0, 1.0, {"round_index": 0}),
    ]


def test_overlap_is_the_part_of_communication_under_the_same_clients_computation():
    assert overlap_fraction(spans()) == pytest.approx(3 / 9)
    elsewhere = [*spans(), Span(1, "compute", "computing", 0.0, 30.0, {"round_index": 0})]
    assert overlap_fraction(elsewhere) == pytest.approx(3 / 9), "another client's computation hides nothing"
    covered = [*spans(), Span(0, "compute", "computing", 20.0, 4.0, {"round_index": 2})]
    assert overlap_fraction(covered) == pytest.approx(7 / 9)
    assert overlap_fraction([]) == 0.0


def test_a_span_is_recorded_also_when_it_fails_and_announced_when_it_begins_and_ends():
    clock, seen = VirtualClock(), []
    trace = Trace(
        clock,
        on_begin=lambda client_id, activity: seen.append((client_id, activity, "begins", clock.now())),
        on_end=lambda client_id, activity: seen.append((client_id, activity, "ends", clock.now())),
    )
    with pytest.raises(RuntimeError), trace.span(3, "compute", "computing", round_index=5):
        clock.sleep(2.0)
        raise RuntimeError
    assert trace.spans == [Span(3, "compute", "computing", 0.0, 2.0, {"round_index": 5})]
    assert seen == [(3, "computing", "begins", 0.0), (3, "computing", "ends", 2.0)]


def test_the_chrome_trace_has_a_row_for_each_thread_and_reads_back(tmp_path):
    path = tmp_path / "trace.json"
    write_chrome_trace(spans(), path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(0, 0): "server", (1, 1): "compute", (1, 2): "communication"}
    upload = next(e for e in events if e["name"] == "uploading")
    assert (upload["ts"], upload["dur"], upload["ph"]) == (8e6, 5e6, "X")
    assert read_chrome_trace(path) == [span for span in spans() if span.activity != "waiting"]


def test_the_timeline_shows_both_threads():
    lines = draw_timeline(spans(), width=24)
    compute, communication = lines[0].split()[-1], lines[1].split()[-1]
    assert compute == "██████████··████████····"
    assert communication == "········▲▲▲▲▲·······▼▼▼▼"
    assert draw_timeline([]) == []
    assert any(
        "more clients" in line
        for line in draw_timeline(
            [*spans(), spans()[0].__class__(7, "compute", "computing", 0, 1, {"round_index": 0})], max_clients=1
        )
    )


def computing(start_s: float, end_s: float, client_id: int = 0) -> Span:
    return Span(client_id, "compute", "computing", start_s, end_s - start_s, {"round_index": 0})


def moving(activity: str, start_s: float, end_s: float, client_id: int = 0) -> Span:
    return Span(client_id, "communication", activity, start_s, end_s - start_s, {"round_index": 0})


def ruler(spans: list[Span]) -> list[tuple[float, float, bool]]:
    return [(p.start_s, p.start_s + p.duration_s, p.is_hidden) for p in cut_transfers(spans)]


def test_a_transfer_is_cut_where_its_client_begins_and_ends_to_compute():
    spans = [computing(0, 2), computing(3, 6), computing(8, 9), moving("uploading", 1, 8)]
    assert ruler(spans) == [(1, 2, True), (2, 3, False), (3, 6, True), (6, 8, False)]


def test_waiting_and_the_server_neither_hide_nor_move():
    waiting = Span(0, "compute", "waiting", 0.0, 9.0, {})
    server = Span(None, "server", "aggregating", 0.0, 9.0, {"round_index": 0})
    assert ruler([waiting, server, moving("downloading", 1, 2)]) == [(1, 2, False)]


def test_both_directions_at_once_are_hidden_by_the_same_computation():
    # up 0–10: 0–6 and 7–10 are hidden, 9 s; down 5–8: 5–6 and 7–8 are hidden, 2 s; together 11 of 13 s
    spans = [computing(0, 6), computing(7, 12), moving("uploading", 0, 10), moving("downloading", 5, 8)]
    assert times_by_client(spans) == {0: ClientTimes(11, 13, 11)}
    assert overlap_fraction(spans) == pytest.approx(11 / 13)
    assert overlap_fraction([*spans[1:]]) == pytest.approx(4 / 13)


def test_a_transfer_of_no_time_has_no_pieces_and_a_client_without_any_has_no_fraction():
    assert ruler([computing(0, 2), moving("uploading", 1, 1)]) == []
    assert times_by_client([computing(0, 2)])[0].hidden_fraction == 0.0


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10), st.booleans()), max_size=12),
    st.lists(st.integers(0, 4), max_size=12),
)
def test_pieces_cover_every_transfer_once_and_agree_with_the_clock_ticked_by_hand(transfers, work):
    spans, now = [], 0
    for k, length in enumerate(work):  # computing and pauses take turns
        if k % 2 == 0 and length:
            spans.append(computing(now, now + length))
        now += length
    seconds = {second for span in spans for second in range(int(span.start_s), int(span.start_s + span.duration_s))}
    names = [("uploading" if up else "downloading", start, start + length) for start, length, up in transfers]
    spans += [moving(*name) for name in names]
    ticks = [second for _, start, end in names for second in range(start, end)]
    pieces = cut_transfers(spans)
    assert sum(piece.duration_s for piece in pieces) == len(ticks)
    assert sum(piece.duration_s for piece in pieces if piece.is_hidden) == sum(tick in seconds for tick in ticks)
