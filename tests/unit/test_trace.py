from __future__ import annotations

import json

import pytest

from parablock.clock import VirtualClock
from parablock.report.timeline import draw_timeline
from parablock.storage.run_directory import overlap_fraction
from parablock.trace import Span, Trace, read_chrome_trace, write_chrome_trace


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
