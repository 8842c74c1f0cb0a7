"""The figures of a report, read as data: what is on which axis, and in which colour."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made_runs import BLOCK_PARAMETERS, COMPUTE_S, a_run, make_run
from parablock.report import gantt
from parablock.report.figures import blocks_figure, clients_figure, loss_figure
from parablock.report.gantt import gantt_figure
from parablock.report.reading import RunRecord, read_runs
from parablock.trace import Span


def by_name(figure: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {trace["name"]: trace for trace in figure["data"] if "name" in trace}


# -- loss -----------------------------------------------------------------------------------------------------


def test_losses_stand_over_rounds_seconds_and_bytes_spent_so_far(tmp_path: Path):
    run = a_run(tmp_path, num_rounds=10, num_clients=3)
    figure = loss_figure([run])
    train, evaluation = figure["data"]
    assert train["x"] == list(range(1, 11))
    assert train["y"] == [pytest.approx(row["train_loss"], rel=1e-5) for row in run.rows]
    # the base model, the eighth round, the last one; a round is 2 s and 4 · 725,504 bytes for each of 3 clients
    assert (evaluation["x"], evaluation["y"][0]) == ([0, 8, 10], 3.8)
    assert figure["axes"]["seconds"][1] == [0, 16.0, 20.0]
    assert figure["axes"]["bytes"][1] == [0, 8 * 12 * BLOCK_PARAMETERS, 10 * 12 * BLOCK_PARAMETERS]
    assert figure["axes"]["rounds"][0] == train["x"]


def test_several_runs_have_a_colour_each_and_their_train_losses_wait_in_the_legend(tmp_path: Path):
    runs = read_runs([make_run(tmp_path / name, delay=delay) for name, delay in (("a", 0), ("b<i>", 1))])
    traces = by_name(loss_figure(runs))
    assert list(traces) == ["a", "b&lt;i&gt;", "a, train loss", "b&lt;i&gt;, train loss"]
    assert traces["a"]["line"]["color"] == traces["a, train loss"]["line"]["color"] == "var(--run-0)"
    assert traces["b&lt;i&gt;"]["line"]["color"] == "var(--run-1)"
    assert [trace["visible"] for trace in traces.values()] == [True, True, "legendonly", "legendonly"]


def test_a_loss_that_is_not_finite_is_left_out(tmp_path: Path):
    run = a_run(tmp_path)
    rows = ({**run.rows[0], "train_loss": float("nan")}, *run.rows[1:])
    train = loss_figure([replace(run, rows=rows)])["data"][0]
    assert train["x"] == list(range(2, 13))


# -- timeline -------------------------------------------------------------------------------------------------


def small_trace() -> list[Span]:
    # computes 0–10, uploads 8–13: 2 s are hidden, 3 s are not; downloads 13–14
    return [
        Span(0, "compute", "computing", 0.0, 10.0, {"round_index": 0, "block_index": 5}),
        Span(0, "communication", "uploading", 8.0, 5.0, {"round_index": 0, "payload_bytes": 1_500_000}),
        Span(0, "communication", "downloading", 13.0, 1.0, {"round_index": 0, "payload_bytes": 900}),
        Span(None, "server", "aggregating", 13.0, 1.0, {"round_index": 0}),
    ]


def test_the_hidden_part_of_a_transfer_has_another_colour_than_the_rest():
    bars = by_name(gantt_figure(small_trace()))
    drawn = {name: list(zip(bar["base"], bar["x"], strict=True)) for name, bar in bars.items()}
    assert drawn == {"computing": [(0, 10)], "hidden": [(8, 2)], "not hidden": [(10, 3), (13, 1)]}
    assert len({bar["marker"]["color"] for bar in bars.values()}) == 3
    assert bars["hidden"]["customdata"] == ["client 0 uploading, round 1, 1.5 MB"]
    assert bars["computing"]["customdata"] == ["client 0 computing, round 1, block 5"]


def test_a_scoring_stands_behind_all_clients_and_nothing_does_without_one():
    two = [Span(1, "compute", "computing", 0.0, 9.0, {"round_index": 0, "block_index": 5})]
    scored = [Span(None, "server", "evaluating", 14.0, 3.0, {"round_index": 0})]
    bar = by_name(gantt_figure([*small_trace(), *two, *scored]))["scoring the model"]
    assert (bar["base"], bar["x"], bar["y"], bar["width"]) == ([14], [3], [0.5], [1.9])
    assert bar["customdata"] == ["scoring the model after round 1"]
    for none in ([], [Span(None, "server", "evaluating", 14.0, 0.0, {"round_index": 0})]):  # as by a virtual clock
        assert "scoring the model" not in by_name(gantt_figure([*small_trace(), *two, *none]))


def test_chunks_that_follow_each_other_at_once_are_one_bar():
    def chunk(start_s: float, round_index: int = 0, activity: str = "uploading") -> Span:
        facts = {"round_index": round_index, "payload_bytes": 1_000_000}
        return Span(0, "communication", activity, start_s, 1.0, facts)

    streamed = [chunk(1.0), chunk(3.0001), chunk(2.0), chunk(2.0, activity="downloading")]
    bars = by_name(gantt_figure(streamed))["not hidden"]
    assert sorted(zip(bars["base"], bars["x"], strict=True)) == [(1, 3.0001), (2, 1)]
    assert {text.split(", ")[-1] for text in bars["customdata"]} == {"3.0 MB", "1.0 MB"}
    apart = [chunk(1.0), chunk(2.5), chunk(3.5, round_index=1)]
    assert len(by_name(gantt_figure(apart))["not hidden"]["x"]) == 3


def test_computing_sending_and_receiving_have_rows_of_their_own_beside_their_client(tmp_path: Path):
    run = a_run(tmp_path, num_clients=3)
    bars = by_name(gantt_figure(run.spans))
    rows = {name: {round(y % 1, 2) for y in bar["y"]} for name, bar in bars.items()}
    assert len(rows["computing"]) == 1 and len(rows["hidden"]) == 2 and not rows["computing"] & rows["hidden"]
    assert {round(y) for y in bars["computing"]["y"]} == {0, 1, 2}


def test_a_long_run_begins_with_its_first_rounds_and_a_short_one_shows_all(tmp_path: Path):
    long, short = a_run(tmp_path / "l", num_rounds=40), a_run(tmp_path / "s", num_rounds=gantt.FIRST_ROUNDS)
    views = gantt_figure(long.spans)["views"]
    assert list(views) == ["first rounds", "all rounds"]
    assert views["first rounds"][1] < views["all rounds"][1] / 4
    assert gantt_figure(long.spans)["layout"]["xaxis"]["range"] == views["first rounds"]
    assert list(gantt_figure(short.spans)["views"]) == ["all rounds"]
    assert views["first rounds"][1] > COMPUTE_S * gantt.FIRST_ROUNDS


def test_of_too_many_bars_whole_rounds_are_drawn_from_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = a_run(tmp_path, num_rounds=30, num_clients=2)
    everything = gantt_figure(run.spans)
    assert (everything["num_rounds"], everything["num_clients"]) == (30, 2)
    monkeypatch.setattr(gantt, "MAX_BARS", 50)
    figure = gantt_figure(run.spans)
    computed = by_name(figure)["computing"]
    assert 0 < figure["num_rounds"] < 30
    assert len(computed["x"]) == 2 * figure["num_rounds"]
    assert sum(len(bar["x"]) for bar in figure["data"]) <= 50
    monkeypatch.setattr(gantt, "MAX_CLIENTS", 1)
    assert gantt_figure(run.spans)["num_clients"] == 1


# -- blocks and clients ---------------------------------------------------------------------------------------


def test_each_block_shows_its_norms_at_its_visits_and_how_many_there_were(tmp_path: Path):
    run = a_run(tmp_path, num_rounds=10, num_blocks=4)
    *lines, bars = blocks_figure(run)["data"]
    visits = [[row for row in run.rows if row["block_index"] == block] for block in range(4)]
    assert bars["x"] == [len(rows) for rows in visits] and sum(bars["x"]) == 10
    assert lines[2]["x"] == [row["round_index"] + 1 for row in visits[2]]
    assert lines[2]["y"] == [pytest.approx(row["delta_norm"], rel=1e-5) for row in visits[2]]
    assert bars["marker"]["color"] == [line["line"]["color"] for line in lines] and len(lines) == 4
    assert lines[3]["name"] == "3 · layers.3"


def with_clients(run: RunRecord, *labels: dict[str, int]) -> RunRecord:
    clients = [{"examples": sum(own.values()), "tokens": 1, "target_tokens": 1, "labels": own} for own in labels]
    return replace(run, manifest={**run.manifest, "clients": clients})


def test_examples_are_stacked_by_label_where_a_client_has_several(tmp_path: Path):
    run = with_clients(a_run(tmp_path), {"yes": 3, "no": 9}, {"no": 4})
    assert {name: bar["y"] for name, bar in by_name(clients_figure(run)).items()} == {"no": [9, 4], "yes": [3, 0]}


def test_of_many_labels_the_rare_ones_are_one_colour(tmp_path: Path):
    counts = {f"label {k}": 100 - k for k in range(12)}
    bars = by_name(clients_figure(with_clients(a_run(tmp_path), counts, counts)))
    assert list(bars) == [f"label {k}" for k in range(7)] + ["other"]
    assert bars["other"]["y"] == [sum(100 - k for k in range(7, 12))] * 2


def test_every_figure_is_json_without_nan(tmp_path: Path):
    run = a_run(tmp_path)
    figures = [loss_figure([run]), blocks_figure(run), clients_figure(run), gantt_figure(run.spans)]
    assert len(json.dumps(figures, allow_nan=False)) > 1000
