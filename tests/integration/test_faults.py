"""The section `faults`, `min_updates` and `deadline_factor` from the command line, and the summary's counts."""

from __future__ import annotations

from pathlib import Path

from parablock.config.load import load_config
from parablock.experiment.run import resume, run
from tiny_runs import Runs, Workshop, after, metrics_of, summary_of

KILLED = "faults=[{client: 3, round: 2, at: train, kind: kill}]"
BRIEFLY = "faults=[{client: 3, round: 2, at: train, kind: kill, value: 1.0}]"


def participants(run_dir: Path) -> list[list[int]]:
    return [row["participants"] for row in metrics_of(run_dir)]


def test_the_summary_counts_each_kind_of_fault_and_of_refused_updates(runs: Runs):
    run_dir = runs(
        "faults=[{client: 2, round: 1, at: upload, kind: nan},"
        " {client: 1, round: 3, at: train, kind: scale, value: 1e9}, {client: 0, round: 4, at: upload, kind: drop},"
        " {client: 3, round: 4, at: upload, kind: corrupt}]"
    )
    summary = summary_of(run_dir)
    assert summary["status"] == "completed"
    assert summary["faults"] == {"nan": 1, "scale": 1, "drop": 1, "corrupt": 1}
    assert summary["refused_updates"] == {"not_finite": 1, "norm": 1, "corrupt": 1}
    assert participants(run_dir) == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3], [0, 2, 3], [1, 2, 3], [0, 1, 2, 3]]
    log = run_dir.with_suffix(".log").read_text()
    assert "refused (not_finite): client 2 sent values that are not finite" in log
    assert not {"faults", "refused_updates"} & set(summary_of(runs()))


def test_with_a_deadline_a_dead_client_costs_less_time_than_the_patience(runs: Runs):
    patient, hurried = runs(KILLED), runs(KILLED, "federation.deadline_factor=2.0")
    assert participants(patient)[2:] == participants(hurried)[2:] == [[0, 1, 2]] * 4
    assert summary_of(patient)["model_sha256"] == summary_of(hurried)["model_sha256"]
    assert summary_of(patient)["wall_time_s"] > 600.0 > summary_of(hurried)["wall_time_s"] + 590.0
    assert summary_of(patient)["model_sha256"] != summary_of(runs())["model_sha256"]


def test_with_min_updates_the_server_waits_for_who_is_back_and_the_model_is_the_undisturbed_one(runs: Runs):
    hurried = runs(BRIEFLY, "federation.deadline_factor=1.2")
    waits = runs(BRIEFLY, "federation.deadline_factor=1.2", "federation.min_updates=4")
    assert summary_of(waits)["model_sha256"] == summary_of(runs())["model_sha256"]
    assert participants(waits) == [[0, 1, 2, 3]] * 6
    assert [0, 1, 2] in participants(hurried)
    assert "client 3 is back" in waits.with_suffix(".log").read_text()


def test_a_run_with_faults_resumes_as_if_it_had_never_stopped(workshop: Workshop, tmp_path: Path):
    faults = (
        "faults=[{client: 2, round: 1, at: upload, kind: nan}, {client: 3, round: 3, at: train, kind: drop},"
        " {client: 1, round: 4, at: upload, kind: sign_flip}]"
    )
    config = load_config(workshop.config, [faults, "federation.deadline_factor=2.0", "checkpoint.every_rounds=0"])
    whole = run(config, tmp_path / "whole")
    for rounds in (1, 3):
        directory = tmp_path / str(rounds)
        assert run(config, directory, asked_to_stop=after(rounds))["status"] == "interrupted"
        resumed = resume(directory)
        assert resumed["model_sha256"] == whole["model_sha256"]
        assert resumed["faults"] == whole["faults"] == {"nan": 1, "drop": 1, "sign_flip": 1}
        assert participants(directory) == participants(tmp_path / "whole")


def test_who_was_dead_at_a_checkpoint_takes_part_again_after_it(workshop: Workshop, tmp_path: Path):
    second = "{client: 2, round: 3, at: upload, kind: kill, value: 900}"
    dead = f"faults=[{{client: 3, round: 1, at: train, kind: kill}}, {second}]"
    config = load_config(workshop.config, [dead, "federation.deadline_factor=2.0", "federation.num_rounds=8"])
    assert run(config, tmp_path / "run", asked_to_stop=after(3))["status"] == "interrupted"
    resumed = resume(tmp_path / "run")
    assert resumed["status"] == "completed"
    counted = participants(tmp_path / "run")
    assert counted[1:3] == [[0, 1, 2]] * 2
    assert counted[-1] == [0, 1, 3], "client 3 is a new process; client 2 dies again, in the round that is repeated"
