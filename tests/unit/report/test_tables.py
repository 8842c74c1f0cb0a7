"""Reports from files: the tables, the page as text, and what happens where a folder holds no run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made_runs import make_run
from parablock.errors import InputError
from parablock.report.reading import RunRecord, read_runs
from parablock.report.tables import (
    UNKNOWN,
    Table,
    ablation_table,
    blocks_table,
    clients_table,
    comparison_table,
    differences_table,
    environment_table,
    headline,
    settings_table,
    to_markdown,
)
from parablock.report.write import write_report
from tiny_runs import command


def a_run(tmp_path: Path, **sizes: Any) -> RunRecord:
    return read_runs([make_run(tmp_path / "run", **sizes)])[0]


def cells(table: Table, column: str) -> list[str]:
    at = table.header.index(column)
    return [row[at] for row in table.rows]


# -- tables ---------------------------------------------------------------------------------------------------


def test_the_headline_says_what_was_learned_hidden_and_spent(tmp_path: Path):
    run = a_run(tmp_path)
    facts = {fact.label: fact for fact in headline(run)}
    assert facts["eval loss"].value == f"{run.rows[-1]['eval_loss']:.3f}"
    assert facts["eval loss"].detail == "base model: 3.800"
    assert facts["communication hidden"].value == f"{run.summary['overlap_fraction']:.0%}" != "0%"
    assert facts["simulated time"].value == "24 s"  # 12 rounds of 2 s
    assert facts["simulated time"].detail == "instead of 43 s one after the other"  # 12 · (2 + 0.9 + 0.7)
    assert facts["bytes"].value == "104.5 MB"  # 12 rounds · 3 clients · 2 ways · 2 bytes · 725,504


def test_a_run_that_was_stopped_has_no_tuned_loss(tmp_path: Path):
    facts = headline(a_run(tmp_path, status="interrupted"))
    assert facts[0].value == UNKNOWN


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


def test_the_blocks_table_compares_the_first_and_the_last_visit(tmp_path: Path):
    run = a_run(tmp_path)
    table = blocks_table(run)
    first, *_, last = [row["delta_norm"] for row in run.rows if row["block_index"] == 1]
    assert (cells(table, "first norm")[1], cells(table, "last norm")[1]) == (f"{first:.3g}", f"{last:.3g}")
    assert cells(table, "visits") == ["3"] * 4
    assert cells(blocks_table(replace(run, rows=run.rows[:2])), "last norm").count(UNKNOWN) == 2


def test_only_settings_that_are_not_the_default_are_listed(tmp_path: Path):
    table = settings_table(a_run(tmp_path, train={"num_local_steps": 3, "learning_rate": 1e-4}))
    settings = dict(table.rows)
    assert settings["train.num_local_steps"] == "3"
    assert "train.learning_rate" not in settings  # given, and the default
    assert settings["data.train"] == "site-0.jsonl, site-1.jsonl, site-2.jsonl"
    many = dict(settings_table(a_run(tmp_path / "b", num_clients=9)).rows)
    assert many["data.train"].endswith("… 9 in all")


def test_the_environment_names_versions_machine_and_models(tmp_path: Path):
    found = dict(environment_table(a_run(tmp_path)).rows)
    assert (found["torch"], found["cpu_count"]) == ("2.13.0", "2")
    assert found["tuned model, sha256"] == "a" * 64
    assert "cuda" not in found


def test_a_comparison_shows_results_and_the_settings_that_differ(tmp_path: Path):
    runs = read_runs([make_run(tmp_path / "over"), make_run(tmp_path / "serial", delay=0)])
    table = comparison_table(runs)
    assert cells(table, "run") == ["over", "serial"]
    assert cells(table, "method") == ["parablock", "fl_bcd"]
    assert cells(table, "hidden")[1] == "0%" != cells(table, "hidden")[0]
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


def test_a_setting_whose_run_was_stopped_has_no_loss(tmp_path: Path):
    whole, stopped = make_run(tmp_path / "whole"), make_run(tmp_path / "stopped", delay=0, status="interrupted")
    assert cells(ablation_table(read_runs([whole, stopped])), "eval loss")[1] == UNKNOWN
    assert cells(ablation_table(read_runs([whole, stopped])), "eval loss")[0] != UNKNOWN


def test_markdown_puts_figures_to_the_right_and_keeps_a_bar_inside_its_cell():
    table = Table(("name", "n"), (("a|b", "1"),))
    assert to_markdown(table) == "| name | n |\n| --- | ---: |\n| a\\|b | 1 |\n"


# -- reading --------------------------------------------------------------------------------------------------


def test_runs_are_told_apart_by_the_shortest_ends_of_their_paths(tmp_path: Path):
    paths = [make_run(tmp_path / name) for name in ("x/one", "y/one", "y/two")]
    assert [run.name for run in read_runs(paths)] == ["x/one", "y/one", "y/two"]
    assert [run.name for run in read_runs(paths[1:])] == ["one", "two"]
    with pytest.raises(InputError, match="named twice"):
        read_runs([paths[0], tmp_path / "y" / ".." / "x" / "one"])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.yaml", None, "holds no run"),
        ("summary.json", None, "has not ended"),
        ("trace.json", None, "trace.json"),
        ("trace.json", "{", "JSONDecodeError"),
        ("metrics.jsonl", '{"round_index": 0', "JSONDecodeError"),
        ("summary.json", "[]", "is not a JSON object"),
        ("config.yaml", "a: [", "ParserError"),
        ("config.yaml", "word", "config.yaml does not hold sections"),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_nothing_is_written(tmp_path, file, content, said):
    run = make_run(tmp_path / "run")
    (run / file).unlink() if content is None else (run / file).write_text(content)
    with pytest.raises(InputError, match=said) as raised:
        write_report([run])
    assert raised.value.remedy
    assert not list(run.glob("report.*"))


def test_a_folder_without_runs_and_one_that_is_not_there_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(InputError, match="there is no folder"):
        write_report([tmp_path / "gone"])


# -- pages ----------------------------------------------------------------------------------------------------


def figures_in(page: str) -> dict[str, Any]:
    (content,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL)
    figures: dict[str, Any] = json.loads(content)
    return figures


def test_a_report_on_one_run_has_its_details_and_no_comparison(tmp_path: Path):
    run = make_run(tmp_path / "run")
    page = write_report([run])
    assert page == run / "report.html"
    assert list(figures_in(page.read_text())) == ["loss", "blocks", "gantt", "clients"]
    tables = (run / "report.md").read_text()
    assert tables.startswith("# run\n") and "## Clients" in tables and "Comparison" not in tables


def test_further_runs_are_compared_with_the_first_and_keep_their_own_reports(tmp_path: Path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", delay=0)
    write_report([second])
    before = (second / "report.html").read_bytes()
    page = write_report([first, second])
    assert page == first / "report.html" and (second / "report.html").read_bytes() == before
    assert list(figures_in(page.read_text())) == ["compared", "loss", "blocks", "gantt", "clients"]
    assert '<a href="../b/report.html">b</a>' in page.read_text()
    for text in ((first / "report.md").read_text(), page.read_text()):
        assert "What differs" in text and "What each setting does" in text


def test_a_report_on_repetitions_does_not_speak_of_settings(tmp_path: Path):
    first, second = (make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    write_report([first, second])
    assert "What each setting does" not in (first / "report.md").read_text() + (first / "report.html").read_text()


def test_a_folder_of_runs_gets_a_comparison_without_details(tmp_path: Path):
    for name in ("one", "two"):
        make_run(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (make_run(tmp_path / "still-going") / "summary.json").unlink()
    page = write_report([tmp_path])
    assert page == tmp_path / "report.html"
    assert list(figures_in(page.read_text())) == ["compared"]
    assert [trace["name"] for trace in figures_in(page.read_text())["compared"]["data"][:2]] == ["one", "two"]


def test_a_run_that_ended_before_its_first_round_has_a_report_too(tmp_path: Path):
    run = make_run(tmp_path / "run", num_rounds=1, status="failed")
    (run / "metrics.jsonl").write_text("")
    (run / "trace.json").write_text('{"traceEvents": []}')
    assert "failed" in write_report([run]).read_text()


def test_a_run_of_before_there_were_counts_of_clients_has_a_report_too(tmp_path: Path):
    run = make_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["clients"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "clients" not in figures_in(write_report([run]).read_text())


def test_names_from_files_are_text_in_the_page_and_not_markup(tmp_path: Path):
    evil = "</script><script>alert(1)</script>"
    run = make_run(tmp_path / "run", model={"name_or_path": evil})
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["clients"][0]["labels"] = {evil: 5, "b": 4}
    (run / "manifest.json").write_text(json.dumps(manifest))
    page = write_report([run]).read_text()
    assert "alert(1)" in page and "<script>alert" not in page
    (figures,) = re.findall(r'id="figures">(.*?)</script>', page, flags=re.DOTALL)
    assert "<" not in figures and "\\u003cbr>" in figures
    names = [trace.get("name", "") for trace in figures_in(page)["clients"]["data"]]
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in names


def test_the_page_allows_its_own_scripts_and_nothing_else(tmp_path: Path):
    page = write_report([make_run(tmp_path / "run")]).read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(hashes) == 2 and re.findall(r"'sha256-([^']*)'", policy) == hashes
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", page) == []


def test_the_plotting_library_comes_with_its_licence():
    from importlib import resources

    assets = resources.files("parablock.report") / "assets"
    assert "MIT License" in (assets / "plotly-basic.LICENSE").read_text()
    assert "Licensed under the MIT license" in (assets / "plotly-basic.min.js").read_text()[:400]


# -- the command ----------------------------------------------------------------------------------------------


def test_the_command_names_what_it_wrote(tmp_path: Path):
    run = make_run(tmp_path / "run")
    outcome = command("report", str(run))
    assert outcome.code == 0
    assert str(run / "report.html") in outcome.stdout and str(run / "report.md") in outcome.stdout


def test_the_command_refuses_a_folder_without_a_run_as_wrong_input(tmp_path: Path):
    outcome = command("report", str(tmp_path))
    assert outcome.code == 2
    assert "holds no run" in outcome.stderr and "Traceback" not in outcome.stderr
