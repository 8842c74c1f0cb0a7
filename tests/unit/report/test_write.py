"""A report as a page and as tables in Markdown."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

from made_runs import figures_in, make_run
from parablock.report.write import write_report
from tiny_runs import command


def test_a_report_on_one_run_has_its_details_and_no_comparison(tmp_path: Path):
    run = make_run(tmp_path / "run")
    page = write_report([run])
    assert page == run / "report.html"
    assert list(figures_in(page.read_text())) == ["loss", "gantt", "clients", "client_losses", "blocks"]
    tables = (run / "report.md").read_text()
    assert tables.startswith("# run\n") and "## Clients" in tables and "Comparison" not in tables


def test_the_loss_comes_before_what_the_models_say(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "answers.json").write_text(json.dumps([{"prompt": "a", "reference": "b", "base": "c", "tuned": "d"}]))
    page = write_report([run])
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert 0 < text.index("3.800 → 1.483") < text.index("What it says")


def test_a_run_without_blocks_has_no_chart_of_them(tmp_path: Path):
    run = make_run(tmp_path / "run", num_blocks=1)
    page = write_report([run])
    assert "blocks" not in figures_in(page.read_text()) and "1 block" not in page.read_text()
    assert "## Blocks" not in (run / "report.md").read_text()
    other = write_report([make_run(tmp_path / "other", num_blocks=2)])
    assert "2 blocks" in other.read_text() and "## Blocks" in (tmp_path / "other" / "report.md").read_text()


def test_further_runs_are_compared_with_the_first_and_keep_their_own_reports(tmp_path: Path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", delay=0)
    write_report([second])
    before = (second / "report.html").read_bytes()
    page = write_report([first, second])
    assert page == first / "report.html" and (second / "report.html").read_bytes() == before
    assert list(figures_in(page.read_text())) == [
        *("compared", "loss", "gantt", "clients", "client_losses", "blocks")
    ]
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


EVIL = "<img src=x onerror=alert(1)> ![see](http://x/y.png) `code` a|b \x1b]0;PWNED\x07 \x00\x9b \u202egnirts"


def test_no_text_of_others_is_markup_or_acts_in_a_report(tmp_path: Path):
    run = make_run(tmp_path / "run", model={"name_or_path": EVIL})
    (run / "answers.json").write_text(
        json.dumps([{"prompt": EVIL, "base": EVIL, "tuned": "a\n# b", "reference": ""}])
    )
    page = write_report([run])
    tables = page.with_suffix(".md").read_text()
    for text in (tables, page.read_text()):
        assert "onerror=alert(1)" in text and "\\u001b]0;PWNED" in text and "\\u202egnirts" in text
        assert re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text) == []
    unmarked = re.sub(r"\\[\\<\[`|]", "", tables)
    assert re.findall(r"[<\[`]", unmarked) == [] and "![" not in unmarked
    assert re.findall(r"[<\[`]", EVIL) == ["<", "[", "`", "`"]
    assert "- tuned model: a # b" in tables.splitlines()


def test_an_answer_that_was_cut_says_so_in_the_report(tmp_path: Path):
    run, record = make_run(tmp_path / "run"), {"prompt": "a", "reference": "b", "base": "It is", "tuned": "It is"}
    (run / "answers.json").write_text(json.dumps([{**record, "base_cut_at": 48}]))
    page = write_report([run])
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert text.count("It is … (cut at 48 tokens)") == 1 and text.count("It is") == 2
    (run / "answers.json").write_text(json.dumps([{**record, "base": "word " * 300, "base_cut_at": 48}]))
    assert write_report([run]).read_text().count("word … (cut at 48 tokens)") == 1  # of a long one, too


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


def test_the_command_names_what_it_wrote(tmp_path: Path):
    run = make_run(tmp_path / "run")
    outcome = command("report", str(run))
    assert outcome.code == 0
    assert str(run / "report.html") in outcome.stdout and str(run / "report.md") in outcome.stdout
