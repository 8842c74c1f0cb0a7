"""What a run writes for people by itself: the report, the counts that it shows, and the files of trackers."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from made_runs import curves, figures_in
from parablock.config.load import load_config
from parablock.experiment.run import run
from tiny_runs import Workshop, after, assert_refused, command, metrics_of, summary_of


def figures_of_page(directory: Path) -> dict[str, Any]:
    return figures_in((directory / "report.html").read_text())


def manifest_of(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return manifest


def interrupt(workshop: Workshop, directory: Path, *overrides: str) -> None:
    config = load_config(workshop.config, overrides)
    assert run(config, directory, asked_to_stop=after(3))["status"] == "interrupted"


def test_a_run_ends_with_a_report_of_its_own_rounds_and_names_it(workshop, tmp_path):
    directory = tmp_path / "run"
    outcome = workshop.run(directory)
    assert outcome.code == 0, outcome.stderr
    assert str(directory / "report.html") in outcome.stdout
    train = figures_of_page(directory)["loss"]["data"][0]
    assert train["y"] == [pytest.approx(row["train_loss"], rel=1e-5) for row in metrics_of(directory)]
    timeline = figures_of_page(directory)["gantt"]
    assert timeline["num_clients"] == 4 and timeline["num_rounds"] == 6
    assert "| client 3 |" in (directory / "report.md").read_text()


def test_the_report_can_be_made_again_from_the_files_and_is_the_same(workshop, tmp_path):
    directory = tmp_path / "run"
    workshop.run(directory)
    before = (directory / "report.html").read_bytes()
    (directory / "report.html").unlink()
    assert command("report", str(directory)).code == 0
    assert (directory / "report.html").read_bytes() == before


def test_an_interrupted_run_has_a_report_that_says_so_and_a_resumed_one_a_new_one(workshop, tmp_path):
    directory = tmp_path / "run"
    interrupt(workshop, directory)
    assert "interrupted" in (directory / "report.html").read_text().split("</header>")[0]
    shown = len(figures_of_page(directory)["loss"]["data"][0]["x"])
    assert 0 < shown < 6
    assert command("resume", str(directory)).code == 0
    assert "completed" in (directory / "report.html").read_text().split("</header>")[0]
    assert len(figures_of_page(directory)["loss"]["data"][0]["x"]) == 6


def test_the_manifest_counts_what_each_client_trains_on(workshop, tmp_path):
    workshop.run(tmp_path / "by-file")
    clients = manifest_of(tmp_path / "by-file")["clients"]
    assert [client["examples"] for client in clients] == [8, 10, 12, 14]
    assert [client["labels"] for client in clients] == [{f"client_{i}.jsonl": 8 + 2 * i} for i in range(4)]
    assert all(0 < client["target_tokens"] < client["tokens"] for client in clients)
    workshop.run(tmp_path / "by-field", "data.partition={scheme: dirichlet, field: completion, alpha: 5}")
    clients = manifest_of(tmp_path / "by-field")["clients"]
    assert sum(client["examples"] for client in clients) == 44
    assert {label.split()[0] for client in clients for label in client["labels"]} == {"####"}
    for client in clients:
        assert sum(client["labels"].values()) == client["examples"]


def test_the_norm_of_a_rounds_delta_is_how_far_the_model_moved(workshop, tmp_path):
    directory = tmp_path / "run"
    changes = ("federation.num_rounds=1", "blocks.allow_unvisited=true", "wire.format=float32")
    assert workshop.run(directory, *changes).code == 0
    base = AutoModelForCausalLM.from_pretrained(workshop.model).state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(directory / "model").state_dict()
    moved = math.sqrt(sum(float(torch.sum((tuned[name] - base[name]) ** 2)) for name in base))
    (row,) = metrics_of(directory)
    assert row["delta_norm"] == pytest.approx(moved, rel=1e-4)
    assert moved > 0.01


def test_tensorboard_gets_the_figures_of_metrics_jsonl_and_the_base_models_loss(workshop, tmp_path):
    directory = tmp_path / "run"
    assert workshop.run(directory, "report_to=tensorboard").code == 0
    rows, found = metrics_of(directory), curves(directory)
    for key in ("train_loss", "compute_s", "uplink_bytes", "delta_norm"):
        assert found[key] == [(row["round_index"] + 1, pytest.approx(row[key], rel=1e-6)) for row in rows]
    base = (0, pytest.approx(summary_of(directory)["initial_eval_loss"], rel=1e-6))
    scored = [(row["round_index"] + 1, row["eval_loss"]) for row in rows if row["eval_loss"] is not None]
    assert found["eval_loss"] == [base, *[(step, pytest.approx(loss, rel=1e-6)) for step, loss in scored]]


def test_without_a_tracker_there_are_no_event_files_and_the_model_is_the_same(workshop, tmp_path):
    workshop.run(tmp_path / "with", "report_to=[tensorboard]")
    workshop.run(tmp_path / "without")
    assert (tmp_path / "with" / "tensorboard").exists() and not (tmp_path / "without" / "tensorboard").exists()
    assert summary_of(tmp_path / "with")["model_sha256"] == summary_of(tmp_path / "without")["model_sha256"]


def test_a_resumed_run_goes_on_in_the_tracker_with_each_step_once(workshop, tmp_path):
    directory = tmp_path / "run"
    interrupt(workshop, directory, "report_to=tensorboard")
    assert command("resume", str(directory)).code == 0
    found, rows = curves(directory), metrics_of(directory)
    assert found["train_loss"] == [(row["round_index"] + 1, pytest.approx(row["train_loss"])) for row in rows]
    assert found["eval_loss"][0][0] == 0


def test_a_tracker_that_is_missing_is_said_before_anything_is_written(workshop, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    outcome = workshop.run(tmp_path / "run", "report_to=tensorboard")
    assert_refused(outcome, "pip install 'parablock[tensorboard]'", "report_to")
    assert not (tmp_path / "run").exists()
