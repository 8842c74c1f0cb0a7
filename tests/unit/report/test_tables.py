"""The tables of a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from made_runs import a_run, make_run
from parablock.report.reading import read_runs
from parablock.report.tables import (
    UNKNOWN,
    Table,
    ablation_table,
    blocks_table,
    client_losses,
    clients_table,
    comparison_table,
    differences_table,
    headline,
    instead_of,
    sentence,
    settings_table,
    to_markdown,
)


def cells(table: Table, column: str) -> list[str]:
    at = table.header.index(column)
    return [row[at] for row in table.rows]


def test_the_headline_says_what_was_learned_hidden_and_spent(tmp_path: Path):
    run = a_run(tmp_path)
    facts = {fact.label: fact for fact in headline(run)}
    assert facts["eval loss"].value == f"3.800 → {run.rows[-1]['eval_loss']:.3f}"
    assert facts["eval loss"].detail == "base model → tuned model"
    assert facts["communication hidden"].value == f"{run.summary['overlap_fraction']:.0%}" != "0%"
    assert facts["simulated time"].value == "24 s"  # 12 rounds of 2 s
    assert facts["simulated time"].detail == "instead of 43 s one after the other"  # 12 · (2 + 0.9 + 0.7)
    assert facts["bytes"].value == "104.5 MB"  # 12 rounds · 3 clients · 2 ways · 2 bytes · 725,504
    assert facts["per client and round"].detail == f"one of {run.summary['num_blocks']} blocks at a time"
    for method, sent in (("fedavg", "the whole model"), ("fedit", "the adapters, not the model")):
        other = replace(run, summary={**run.summary, "method": method, "num_blocks": 1})
        assert {fact.label: fact for fact in headline(other)}["per client and round"].detail == sent


def test_the_clients_table_adds_up_counts_and_seconds_of_each(tmp_path: Path):
    run = a_run(tmp_path)
    table = clients_table(run)
    assert cells(table, "examples") == [str(client["examples"]) for client in run.manifest["clients"]]
    assert cells(table, "communication, s") == ["19.2"] * 3  # 12 · (0.9 + 0.7)
    assert cells(table, "rounds") == ["12"] * 3
    rows = tuple({**row, "participants": [0, 2]} for row in run.rows)
    assert cells(clients_table(replace(run, rows=rows)), "rounds") == ["12", "0", "12"]
    bare = replace(run, manifest={}, spans=())
    assert {cells(clients_table(bare), column)[0] for column in ("examples", "compute, s", "hidden")} == {UNKNOWN}


def test_without_a_link_nothing_is_said_to_be_hidden(tmp_path: Path):
    linked, free = a_run(tmp_path / "linked"), a_run(tmp_path / "free", link={})
    assert "communication hidden" in {fact.label for fact in headline(linked)}
    assert "hidden" in clients_table(linked).header and "was hidden" in sentence(linked)
    assert "communication hidden" not in {fact.label for fact in headline(free)}
    assert "hidden" not in clients_table(free).header and "hidden" not in sentence(free)
    assert "hidden" in sentence(a_run(tmp_path / "real", link={}, engine={"name": "remote"}))


def test_no_time_is_said_to_be_instead_of_the_same_time(tmp_path: Path):
    run = a_run(tmp_path)
    assert instead_of(run.summary) == "instead of 43 s one after the other"
    same = run.summary | {"wall_time_s": 600.0, "sequential_s": 601.0}
    assert instead_of(same) == instead_of(same | {"sequential_s": 580.0}) == ""
    assert "instead" not in sentence(replace(run, summary=same))


def test_a_sentence_says_what_came_of_a_run(tmp_path: Path):
    run = a_run(tmp_path)
    summary = run.summary | {"initial_eval_loss": 4.0, "final_eval_loss": 3.0}
    said = sentence(replace(run, summary=summary))
    assert said.startswith(
        "On held-out text the loss fell by 25%, from 4.000 to 3.000. 12 rounds of 3 clients took 24 s"
    )
    worse = sentence(replace(run, summary=summary | {"final_eval_loss": 5.0}))
    assert "rose by 25%" in worse
    stopped = a_run(tmp_path / "b", status="interrupted")
    assert sentence(stopped).startswith("The run was stopped after 12 of 12 rounds;")


def test_of_a_run_that_was_stopped_the_newest_loss_is_told_and_its_round(tmp_path: Path):
    stopped = a_run(tmp_path, num_rounds=11, status="interrupted")
    scored = [row["round_index"] + 1 for row in stopped.rows if row["eval_loss"] is not None]
    stopped = replace(stopped, rows=stopped.rows[:10])
    assert scored == [8, 11]
    loss = stopped.rows[7]["eval_loss"]
    fact = headline(stopped)[0]
    assert (fact.value, fact.detail) == (f"3.800 → {loss:.3f}", "base model → round 8")
    assert cells(comparison_table([stopped]), "eval loss")[1] == f"{loss:.4f} (round 8)"
    assert sentence(stopped).endswith(f"from 3.800 to {loss:.3f}, until round 8.")
    unscored = replace(stopped, rows=stopped.rows[:7])
    fact = headline(unscored)[0]
    assert (fact.value, fact.detail) == (f"3.800 → {UNKNOWN}", "base model → not scored")
    assert cells(comparison_table([unscored]), "eval loss")[1] == UNKNOWN
    assert "loss" not in sentence(unscored)


def test_the_losses_of_each_client_are_told_apart(tmp_path: Path):
    run = a_run(tmp_path)
    losses = client_losses(run)
    assert [number for number, _ in losses[2]] == list(range(1, 13))
    assert losses[2][0][1] == run.rows[0]["train_loss"] + 0.2
    assert cells(clients_table(run), "last loss")[0] == f"{run.rows[-1]['train_loss']:.3f}"
    earlier = replace(
        run, rows=tuple({k: v for k, v in row.items() if k != "participant_losses"} for row in run.rows)
    )
    assert client_losses(earlier) == {} and cells(clients_table(earlier), "last loss") == [UNKNOWN] * 3


def test_the_blocks_table_compares_the_first_and_the_last_visit(tmp_path: Path):
    run = a_run(tmp_path)
    table = blocks_table(run)
    first, *_, last = [row["delta_norm"] for row in run.rows if row["block_index"] == 1]
    assert (cells(table, "first norm")[1], cells(table, "last norm")[1]) == (f"{first:.3g}", f"{last:.3g}")
    assert cells(table, "visits") == ["3"] * 4
    assert cells(blocks_table(replace(run, rows=run.rows[:2])), "last norm").count(UNKNOWN) == 2


def test_only_settings_that_are_not_the_default_are_listed(tmp_path: Path):
    table = settings_table(a_run(tmp_path, train={"num_local_steps": 3, "learning_rate": 5e-4}))
    settings = dict(table.rows)
    assert settings["train.num_local_steps"] == "3"
    assert "train.learning_rate" not in settings  # given, and the default
    assert settings["data.train"] == "site-0.jsonl, site-1.jsonl, site-2.jsonl"
    many = dict(settings_table(a_run(tmp_path / "b", num_clients=9)).rows)
    assert many["data.train"].endswith("… 9 in all")


def test_what_the_run_has_chosen_is_told_from_what_was_given(tmp_path: Path):
    run = a_run(tmp_path, engine={"num_threads": 3})
    assert dict(settings_table(run).rows)["engine.num_threads"] == "3"
    chosen = replace(run, manifest={**run.manifest, "chosen_settings": ["engine.num_threads"]})
    assert dict(settings_table(chosen).rows)["engine.num_threads"] == "3 (chosen by the run)"


def test_a_comparison_shows_results_and_the_settings_that_differ(tmp_path: Path):
    runs = read_runs([make_run(tmp_path / "over"), make_run(tmp_path / "serial", delay=0)])
    table = comparison_table(runs)
    assert cells(table, "run") == ["base model", "over", "serial"]
    assert cells(table, "method") == ["", "parablock", "fl_bcd"]
    assert cells(table, "eval loss")[0] == "3.8000"
    assert cells(table, "hidden")[2] == "0%" != cells(table, "hidden")[1]
    free = read_runs([make_run(tmp_path / name, link={}) for name in ("a", "b")])
    assert "hidden" not in comparison_table(free).header
    assert cells(comparison_table([runs[0], free[0]]), "hidden")[1:] == [cells(table, "hidden")[1], "–"]
    different = {row[0]: row[1:] for row in differences_table(runs).rows}
    assert different == {"federation.delay": ("1", "0"), "federation.method": ("parablock", "fl_bcd")}


def test_settings_that_differ_stand_beside_results_with_a_mean_over_seeds(tmp_path: Path):
    runs = [make_run(tmp_path / f"{delay}-{seed}", delay=delay, seed=seed) for delay in (1, 0) for seed in (0, 1)]
    losses = [4.0, 5.0, 3.0, 3.0]
    for run, loss in zip(runs, losses, strict=True):
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"final_eval_loss": loss}))
    table = ablation_table(read_runs(runs))
    assert table.header[:3] == ("federation.method", "federation.delay", "seeds")
    assert cells(table, "federation.delay") == ["1", "0"]
    assert cells(table, "seeds") == ["2", "2"]
    assert cells(table, "eval loss") == ["4.5000 ± 0.7071", "3.0000 ± 0.0000"]
    seconds = [float(cell) for cell in cells(table, "time, s")]
    assert seconds[0] < seconds[1]
    alone = ablation_table(read_runs(runs[:2]))  # nothing but the seed differs
    assert alone.rows == ()
    one, other = read_runs([runs[0], runs[2]])
    assert cells(ablation_table([one, other]), "eval loss") == ["4.0000", "3.0000"]


def test_markdown_puts_figures_to_the_right_and_keeps_a_bar_inside_its_cell():
    table = Table(("name", "n"), (("a|b", "1"),))
    assert to_markdown(table) == "| name |   n |\n| ---- | --: |\n| a\\|b |   1 |"
