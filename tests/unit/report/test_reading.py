"""Run directories as a report reads them: what is missing or damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from made_runs import make_run
from parablock.errors import InputError
from parablock.report.reading import read_runs
from parablock.report.write import write_report


def test_runs_are_told_apart_by_the_shortest_ends_of_their_paths(tmp_path: Path):
    paths = [make_run(tmp_path / name) for name in ("x/one", "y/one", "y/two")]
    assert [run.name for run in read_runs(paths)] == ["x/one", "y/one", "y/two"]
    assert [run.name for run in read_runs(paths[1:])] == ["one", "two"]
    with pytest.raises(InputError, match="named twice"):
        read_runs([paths[0], tmp_path / "y" / ".." / "x" / "one"])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.yaml", None, "it has no config.yaml"),
        ("summary.json", None, "has not ended"),
        ("metrics.jsonl", "", "metrics.jsonl has 0 rounds, and 12 are done"),
        ("answers.json", '[{"prompt": "a', "answers.json: Unterminated string"),
        ("trace.json", None, "trace.json"),
        ("trace.json", "{", "JSONDecodeError"),
        ("metrics.jsonl", '{"round_index": 0', "JSONDecodeError"),
        ("summary.json", "[]", "is not a JSON object"),
        ("summary.json", "{}", "summary.json, status: Field required"),
        ("metrics.jsonl", '"x"', "metrics.jsonl, 0: it must be a section of settings"),
        ("answers.json", '{"a": 1}', "answers.json: it must be a list"),
        ("answers.json", '[{"prompt": 1}]', "answers.json, 0.prompt: it must be text"),
        ("manifest.json", '{"clients": 1}', "manifest.json, clients: it must be a list"),
        ("manifest.json", '{"blocks": [{}]}', "manifest.json, blocks.0.index: Field required"),
        ("trace.json", "[]", "cannot be read: TypeError"),
        ("trace.json", '{"traceEvents": [3]}', "cannot be read: TypeError"),
        ("config.yaml", "link: 3", "config.yaml, link: it does not hold settings"),
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


@pytest.mark.parametrize(("status", "can_resume"), [("completed", False), ("interrupted", True)])
def test_a_lost_file_is_made_anew_by_a_run_that_is_not_complete(tmp_path: Path, status: str, can_resume: bool):
    run = make_run(tmp_path / "run", status=status)
    (run / "trace.json").unlink()
    with pytest.raises(InputError, match="trace") as raised:
        read_runs([run])
    assert ("parablock resume" in raised.value.remedy) == can_resume and "copy" in raised.value.remedy


def test_a_run_of_a_method_that_this_release_does_not_have_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run")
    assert read_runs([run])
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"method": "newer"}))
    with pytest.raises(InputError, match=r"summary.json, method: .*newer is no method of this release"):
        read_runs([run])


def test_a_folder_without_runs_and_one_that_is_not_there_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(InputError, match="there is no folder"):
        write_report([tmp_path / "gone"])
