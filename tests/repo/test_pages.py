"""The pages in docs/ against the code: generated ones are fresh, quoted ones are true, and the site builds."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from outcomes import ended
from parablock import errors
from parablock.config.keys import RunConfig
from parablock.config.methods import METHODS
from tiny_runs import Runs, metrics_of, summary_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text()


def script(name: str) -> ModuleType:
    """Load a script that writes a page."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the configuration reference ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The script that writes the reference."""
    return script("generate_configuration")


def rows_of(text: str) -> dict[str, list[str]]:
    """Read the rows of all tables by their first cell, without its marks."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_configuration_reference_is_what_the_models_say(reference: ModuleType):
    assert page("configuration.md") == reference.page(), (
        "stale; run: .venv/bin/python docs/generate_configuration.py"
    )


def test_the_table_of_methods_is_what_their_rows_say(reference: ModuleType, monkeypatch: pytest.MonkeyPatch):
    text = page("baselines.md")
    assert text == reference.baselines(text), "stale; run: .venv/bin/python docs/generate_configuration.py"
    assert all(row in rows_of(text) for row in METHODS)
    monkeypatch.setitem(METHODS, "fedavg", replace(METHODS["fedavg"], summary="Another sentence."))
    assert rows_of(reference.baselines(text))["fedavg"][-1] == "Another sentence."


def test_the_reference_follows_the_models(reference: ModuleType, monkeypatch: pytest.MonkeyPatch):
    field = RunConfig.model_fields["seed"]
    monkeypatch.setattr(field, "default", 7)
    monkeypatch.setattr(field, "description", "Another meaning.")
    assert rows_of(reference.page())["seed"][1:] == ["`7`", "yes", "Another meaning."]
    assert page("configuration.md") != reference.page()


# -- results --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return script("generate_results")


def test_the_results_are_those_of_the_records(results: ModuleType):
    assert page("results.md") == results.page(), "stale; run: .venv/bin/python docs/generate_results.py"


def test_a_record_that_changed_makes_the_results_stale(results: ModuleType, tmp_path: Path):
    for record in results.RESULTS.glob("*.json"):
        (tmp_path / record.name).write_text(record.read_text())
    assert results.page(tmp_path) == results.page()
    changed = json.loads((tmp_path / "rate.json").read_text())
    changed["section"]["parts"][-1]["rows"][0][1] = "-0.5 ± 0.1"
    (tmp_path / "rate.json").write_text(json.dumps(changed))
    assert results.page(tmp_path) != results.page()


def test_the_readme_has_the_figures_of_the_records(results: ModuleType, tmp_path: Path):
    text = (ROOT / "README.md").read_text()
    assert text == results.readme(text), "stale; run: .venv/bin/python docs/generate_results.py"
    (tmp_path / "rate.json").write_text((results.RESULTS / "rate.json").read_text())
    alone = results.readme(text, tmp_path)
    assert alone.count("docs/results.md#") < text.count("docs/results.md#")
    assert "(docs/results.md#the-same-rate)" in alone and alone.startswith(text[:300])


def test_the_page_on_the_paper_has_the_figures_of_the_records(results: ModuleType, tmp_path: Path):
    text = page("paper.md")
    assert text == results.paper(text), "stale; run: .venv/bin/python docs/generate_results.py"
    (tmp_path / "rate.json").write_text((results.RESULTS / "rate.json").read_text())
    alone = results.paper(text, tmp_path)
    assert (
        "final loss on T0" not in alone
        and alone.count("results.md#the-same-rate") == text.count("results.md#the-same-rate") == 3
    )
    assert alone.count("[record]") == 3 < text.count("[record]")


def test_the_figures_are_those_of_the_records(results: ModuleType, tmp_path: Path):
    assert all((DOCS / name).read_text() == svg for name, svg in results.figures().items())
    curves = {"block": [[1.0, 0.0], [100.0, 50.0]], "rank <1>": [[0.1, 5.0]]}
    part = {"figure": "facts.svg", "y": "bits", "panels": {"MB": curves, "seconds": curves}}
    record = json.loads((results.RESULTS / "rate.json").read_text())
    record["section"]["parts"].append(part)
    (tmp_path / "rate.json").write_text(json.dumps(record))
    (svg,) = results.figures(tmp_path).values()
    assert svg.count("<polyline") == 4 and "rank &lt;1&gt;" in svg
    assert 'points="205.3,290.0 484.2,30.0"' in svg  # from 0.1/1.1 to 110 MB in 430 units
    assert "MB (logarithmic)" in svg and all(f">{told}</text>" in svg for told in ("0.1", "50", "100", "0", "40"))
    record["section"]["parts"][-1] = part | {
        "linear": ["MB"],
        "panels": {"MB": {"block": [[0.0, 0.9], [4.0, 0.8]]}},
    }
    (tmp_path / "rate.json").write_text(json.dumps(record))
    (svg,) = results.figures(tmp_path).values()
    assert 'points="60.0,41.8 490.0,278.2"' in svg and "logarithmic" not in svg  # heights of 0.795 to 0.905
    assert all(f">{told}</text>" in svg for told in ("0", "4", "0.8", "0.9"))
    assert "![bits](facts.svg)" in results.page(tmp_path)


def test_what_is_measured_on_a_toy_says_so_first(results: ModuleType):
    found = results.records(results.RESULTS)
    toys = {
        name for name, record in found.items() if record["section"]["parts"][0].startswith(("A toy: ", "Toys: "))
    }
    on_tiny_base = {name for name, record in found.items() if "tiny-base" in str(record["config"])}
    assert on_tiny_base - toys == {"slow_link"}  # of its model it takes nothing: the bytes are those of Llama-3-8B
    assert {"rate", "ablations", "model_ablations", "soak", "step"} <= toys
    assert toys.isdisjoint({"wire", "deployment", "scale"})
    marked = {line.partition("](#")[2].partition(")")[0] for line in results.glance(found) if ", a toy |" in line}
    assert results.anchor(found["rate"]) in marked
    assert marked <= {results.anchor(found[name]) for name in toys}


def test_the_first_table_says_which_bars_are_missed(results: ModuleType):
    def record(is_met: bool) -> dict[str, Any]:
        bar = {"name": "int4 bytes / float32 bytes", "value": 0.125, "limit": 0.14, "at_most": True}
        bar |= {"is_met": is_met}
        return {"wire": {"bars": [bar], "section": {"title": "The wire: bytes", "parts": ["Bytes."]}}}

    assert results.glance(record(True))[2:3] == ["| **Quality under a budget** |  |  |"]
    (*_, met), (*_, missed) = (results.glance(record(is_met)) for is_met in (True, False))
    assert met.endswith("](#the-wire-bytes) | 0.125 | ≤ 0.14 |")
    assert "**0.125**, missed" in missed
    assert "1 bars; 0 of them are missed" in results.missed(record(True))
    assert "1 of them are missed, under [The wire: bytes](#the-wire-bytes)" in results.missed(record(False))


# -- troubleshooting ------------------------------------------------------------------------------------------


def literals(source: str) -> Iterator[str]:
    """Yield every text of a module, with … where a value goes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)


def told(message: str, texts: list[str]) -> bool:
    """Tell whether the program can write this message, in which … is any value."""
    parts = [re.escape(part) for part in message.replace("… is not built yet in this version", "…").split("…")]
    wanted = re.compile(".*".join(parts).strip(), flags=re.DOTALL)
    return any(wanted.search(text) for text in texts)


def quoted(text: str) -> list[str]:
    """List the messages in the first column of the tables."""
    cells = [line.removeprefix("| ").split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [cell.strip("`") for cell in cells]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for path in (ROOT / "src").rglob("*.py") for text in literals(path.read_text())]


def test_every_message_of_the_troubleshooting_page_is_one_that_the_program_writes(texts: list[str]):
    messages = quoted(page("troubleshooting.md"))
    assert len(messages) >= 35
    assert [message for message in messages if not told(message, texts)] == []


def test_a_message_that_the_program_does_not_write_is_found(texts: list[str]):
    assert not told("… is quite empty: it holds no row.", texts)
    assert not told("There is no model folder … at all", texts)
    assert told("… is empty: it holds no row.", texts)
    assert list(literals("f'a {b} c' + 'd'"))[:2] != ["a b c"]


def test_every_error_that_can_be_met_has_a_heading():
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    kinds = {"ParaBlockError", "InputError", "WireError"}  # never raised themselves, but for reports
    headings = set(re.findall(r"^## (\w+Error)$", page("troubleshooting.md"), flags=re.MULTILINE))
    assert headings == {name for name in classes if name.endswith("Error")} - kinds


# -- metrics --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(runs: Runs) -> Path:
    """A run directory."""
    return runs()


def documented(section: str) -> set[str]:
    """List the names in the first column of one table of the metrics page."""
    part = page("metrics.md").split(f"## `{section}`", 1)[1].split("\n## ", 1)[0]
    cells = re.findall(r"^\| (`[^|]*) \|", part, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def events(run_dir: Path) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    return content


def test_the_metrics_page_has_exactly_the_keys_of_the_files(finished: Path):
    assert documented("metrics.jsonl") == {key for row in metrics_of(finished) for key in row}
    assert documented("summary.json") == set(summary_of(finished))
    assert documented("trace.json") == {key for event in events(finished) for key in event}


def test_the_metrics_page_names_every_activity_and_argument_of_the_trace(finished: Path):
    part = page("metrics.md").split("## `trace.json`", 1)[1]
    named = {event["name"] for event in events(finished)} | {key for e in events(finished) for key in e["args"]}
    assert len(named) > 5
    assert [name for name in sorted(named) if f"`{name}`" not in part] == []


# -- the site -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path):
    done = ended([sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", DOCS, tmp_path / "site"])
    assert (done.code, done.stderr) == (0, "")
    algorithm = (tmp_path / "site" / "algorithm.html").read_text()
    assert 'class="nf">working_block<' in algorithm  # the code …
    assert "<math" in algorithm  # … beside the equations
    for path in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', path.read_text())
        loaded += re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"', path.read_text())
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []


PROMISE = re.compile(
    r"\b(never|nobody|nothing|none|cannot|always|only|once|alone|void|named|found|fixed|hides?|counts?|refuse[sd]?)\b"
)
PROMISES = {"privacy.md": 60, "security.md": 20, "data-protection.md": 12}
"""How many sentences of a page promise something, when its table was last held against them."""


def promises(text: str) -> list[str]:
    """List the sentences before the table of tests that promise something, by their words."""
    prose = re.sub(
        r"```.*?```|^\|.*?$|^#.*?$", "", text.partition("## What holds these promises")[0], flags=re.S | re.M
    )
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=- )", prose)]
    return [s for part in paragraphs for s in re.split(r"(?<=[.:;]) (?=[A-Z*`])", part) if PROMISE.search(s)]


@pytest.mark.parametrize("name", PROMISES)
def test_a_sentence_that_promises_something_cannot_come_or_go_unseen(name: str):
    found = promises(page(name))
    assert len(found) == PROMISES[name], (
        f"{name} promises something more, or less: give it a row in the table of tests, then count it here. "
        "The sentences are:\n" + "\n".join(found)
    )
    assert promises(f"It never does. It may.\n\n| a table never counts |\n\n{page(name)}") == [
        "It never does.",
        *found,
    ]


def named_tests(text: str) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", text))


def rows_of_promises(text: str) -> list[str]:
    table = text.split("## What holds these promises")[1].partition("|---|---|\n")[2]
    return [line for line in table.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", ["privacy.md", "security.md", "data-protection.md"])
def test_every_promise_of_privacy_and_security_names_a_test_that_there_is(name: str):
    there = {
        test for path in ROOT.glob("tests/**/test_*.py") for test in re.findall(r"def (test_\w+)", path.read_text())
    }
    rows = rows_of_promises(page(name))
    assert len(rows) > 12
    assert [row for row in rows if not named_tests(row)] == []
    assert sorted(named_tests(page(name)) - there) == []
    assert named_tests("| a promise | `test_that_nobody_wrote` |") - there, "a name that is none is seen"
