"""A client is forgotten: the model is bitwise that of a run in which it never took part."""

from __future__ import annotations

from pathlib import Path

import pytest

from parablock.experiment.forget import replay_without
from tiny_runs import Runs, Workshop, command, metrics_of, summary_of

DRAWN = (
    "federation.participation=0.5",
    "federation.num_rounds=12",
    "checkpoint.keep=9",
    "checkpoint.every_rounds=1",
)


def sha(run_dir: Path) -> str:
    return str(summary_of(run_dir)["model_sha256"])


def losses(run_dir: Path) -> list[tuple[object, object]]:
    return [(row["train_loss"], row["eval_loss"]) for row in metrics_of(run_dir)]


@pytest.mark.parametrize(("delay", "in_flight"), [(0, "aligned"), (1, "aligned"), (1, "share")])
def test_an_excluded_client_might_as_well_not_exist(runs: Runs, workshop: Workshop, delay: int, in_flight: str):
    """The last of four clients is excluded, or there are three."""
    files = ", ".join(str(workshop.client_file(i)) for i in range(3))
    how = [f"federation.delay={delay}", *[f"federation.in_flight={in_flight}"] * (in_flight != "aligned")]
    excluded = runs(*how, "federation.excluded_clients=[3]")
    three = runs(*how, "federation.num_clients=3", f"data.train=[{files}]")
    assert sha(excluded) == sha(three) != sha(runs(*how))
    assert losses(excluded) == losses(three)
    assert {client_id for row in metrics_of(excluded) for client_id in row["participants"]} == {0, 1, 2}


def test_forgetting_says_first_what_it_costs_and_does_nothing(runs: Runs, tmp_path: Path):
    outcome = command("forget", str(runs()), "--client", "1", "--output-dir", str(tmp_path / "out"))
    assert outcome.code == 0
    for words in ("is round 1.", "from the base model: 6 rounds", "Nothing has been done"):
        assert words in outcome.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("client_id", [0, 2])
def test_a_client_that_took_part_from_the_beginning_is_forgotten(runs: Runs, tmp_path: Path, client_id: int):
    before = sha(runs())
    outcome = command(
        "forget", str(runs()), "--client", str(client_id), "--output-dir", str(tmp_path / "out"), "--yes"
    )
    assert outcome.code == 0, outcome.stderr
    assert f"still holds what client {client_id} sent" in " ".join(outcome.stdout.split())
    assert sha(tmp_path / "out") == sha(runs(f"federation.excluded_clients=[{client_id}]")) != before
    assert losses(tmp_path / "out") == losses(runs(f"federation.excluded_clients=[{client_id}]"))
    assert sha(runs()) == before, "the run itself stays"


def test_rounds_before_it_took_part_are_not_trained_again(runs: Runs, tmp_path: Path):
    run_dir = runs(*DRAWN)
    first = {}
    for row in metrics_of(run_dir):
        for client_id in row["participants"]:
            first.setdefault(client_id, row["round_index"])
    client_id, took_part = max(first.items(), key=lambda item: item[1])
    assert took_part > 0, "the draws of this seed have somebody who comes later"
    replay = replay_without(run_dir, client_id)
    kept = sorted(int(path.name[-6:]) for path in (run_dir / "checkpoints").iterdir())
    assert replay.first_round == took_part
    assert replay.begins_at == max((t for t in kept if t <= took_part), default=0)
    outcome = command(
        "forget", str(run_dir), "--client", str(client_id), "--output-dir", str(tmp_path / "o"), "--yes"
    )
    assert outcome.code == 0, outcome.stderr
    whole = runs(*DRAWN, f"federation.excluded_clients=[{client_id}]")
    assert sha(tmp_path / "o") == sha(whole) != sha(run_dir)
    assert losses(tmp_path / "o") == losses(whole)


def test_a_run_with_noise_is_replayed_from_its_beginning(runs: Runs, tmp_path: Path):
    noisy = (*DRAWN, "checkpoint.keep=99", "privacy={clip_norm: 1.0, noise_multiplier: 0.1}")
    run_dir = runs(*noisy)
    first = {}
    for row in metrics_of(run_dir):
        for client_id in row["participants"]:
            first.setdefault(client_id, row["round_index"])
    client_id, took_part = max(first.items(), key=lambda item: item[1])
    assert took_part > 0 == replay_without(run_dir, client_id).begins_at
    out = str(tmp_path / "out")
    outcome = command("forget", str(run_dir), "--client", str(client_id), "--output-dir", out, "--yes")
    assert outcome.code == 0, outcome.stderr
    assert client_id not in {asked for row in metrics_of(tmp_path / "out") for asked in row["participants"]}


def test_what_cannot_be_forgotten_is_refused(runs: Runs, workshop: Workshop, tmp_path: Path):
    for arguments, words in (
        ([str(runs()), "--client", "4"], "clients 0 to 3"),
        ([str(tmp_path), "--client", "0"], "holds no run"),
    ):
        outcome = command("forget", *arguments)
        assert outcome.code == 2 and words in outcome.stderr
    for more, words in (
        ("federation={excluded_clients: [7], num_clients: 4}", "there is no client 7"),
        ("federation={excluded_clients: [0, 1, 2, 3], num_clients: 4}", "leaves 0 clients"),
        ("federation={excluded_clients: [0], num_clients: 4, method: fedcybgd}", "not built yet"),
        ("engine={name: remote}", "not built yet"),
    ):
        sets = [word for one in ("federation.excluded_clients=[0]", more) for word in ("--set", one)]
        outcome = command("run", str(workshop.config), "--output-dir", str(tmp_path / "out"), *sets)
        assert outcome.code == 2 and words in outcome.stderr, outcome.stderr
