"""`parablock eval --harness`: lm-evaluation-harness on the models of a run, without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from parablock.evaluation.harness import score_with_harness
from tiny_runs import Workshop, assert_refused, command, done, write_rows


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of four sums, as the clients' rows have them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{k} plus 2?", "answer": f"#### {k + 2}"} for k in range(4)]
    task = {
        "task": "local_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_rows(folder / "sums.jsonl", rows))}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    (folder / "local_sums.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_both_models_of_a_run_are_scored_on_a_task_of_a_local_file(
    workshop: Workshop, tasks: Path, tmp_path: Path
) -> None:
    outcome = workshop.run(tmp_path / "run", "federation.num_rounds=8", "train.learning_rate=0.03")
    assert outcome.code == 0, outcome.stderr
    base, tuned = score_with_harness(str(tmp_path / "run"), ["local_sums"], tasks_dir=tasks, device="cpu")
    assert [(score.label, score.task, score.metric) for score in (base, tuned)] == [
        ("base", "local_sums", "perplexity"),
        ("tuned", "local_sums", "perplexity"),
    ]
    assert (base.count, tuned.count) == (4, 4)
    assert 1.0 < tuned.value < 0.5 * base.value
    folder = ("--tasks-dir", str(tasks), "--max-examples", "2")
    said = done("eval", str(tmp_path / "run"), "--harness", "local_sums", *folder)
    assert "local_sums" in said.stdout and "tuned" in said.stdout


def test_an_unknown_task_and_a_folder_that_is_not_there_are_errors(
    workshop: Workshop, tasks: Path, tmp_path: Path
) -> None:
    for task, folder, said in (("nope", tasks, "nope"), ("local_sums", tmp_path / "gone", "no folder")):
        assert_refused(command("eval", str(workshop.model), "--harness", task, "--tasks-dir", str(folder)), said)


def test_without_the_harness_the_error_says_how_to_get_it(
    workshop: Workshop, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = command("eval", str(workshop.model), "--harness", "local_sums", "--tasks-dir", str(tasks))
    assert_refused(outcome, "parablock[eval]")


def test_something_to_score_on_has_to_be_given(workshop: Workshop) -> None:
    assert_refused(command("eval", str(workshop.model)), "--data")


def test_a_run_with_a_model_for_each_client_asks_for_one_of_them(workshop: Workshop, tmp_path: Path) -> None:
    workshop.run(tmp_path / "run", "federation.method=local", "federation.delay=0", "federation.num_rounds=1")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    assert_refused(command("eval", str(tmp_path / "run"), "--data", str(workshop.test_file)), "client_0")
