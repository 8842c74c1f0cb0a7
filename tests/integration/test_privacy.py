"""Whole runs with clipping and noise: what they change and report, and that resume repeats the same noise."""

from __future__ import annotations

import importlib.util
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parablock import load_config, resume, run
from parablock.algorithm.schedule import cohort
from parablock.errors import CheckpointError, ConfigError, StorageError
from parablock.privacy.accounting import Accountant
from tiny_runs import Workshop, after, metrics_of

KEY = bytes(range(32))
CENTRAL = ("privacy.clip_norm=0.5", "privacy.noise_multiplier=0.1")
LOCAL = (*CENTRAL, "privacy.mode=local", "privacy.delta=1e-6")


class Messages:
    """Collects what a user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.fixture
def known_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every run the same key, so that two of them can be compared."""
    monkeypatch.setattr("parablock.experiment.run.new_secret", lambda: KEY)


def summary(workshop: Workshop, output_dir: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return run(load_config(workshop.config, overrides), output_dir, **options)


def test_without_noise_and_below_the_bound_a_run_is_the_plain_one_bitwise(workshop: Workshop, tmp_path: Path):
    plain = summary(workshop, tmp_path / "plain")
    bounded = summary(workshop, tmp_path / "bounded", "privacy.clip_norm=1e6")
    clipped = summary(workshop, tmp_path / "clipped", "privacy.clip_norm=0.001")
    assert bounded["model_sha256"] == plain["model_sha256"] != clipped["model_sha256"]
    for one in (plain, bounded, clipped):
        assert "epsilon" not in one
    assert not (tmp_path / "bounded" / "privacy.key").exists()


def test_an_update_that_clipping_takes_away_is_warned_about(workshop: Workshop, tmp_path: Path):
    clipped, quiet = Messages(), Messages()
    summary(workshop, tmp_path / "clipped", "privacy.clip_norm=0.0001", progress=clipped)
    told = [line for line in clipped.lines if "clipping removes" in line]
    assert any(line.startswith("client 2, block 0: clipping removes ") for line in told)
    assert len(told) == len(set(told)) <= 16  # once for each client and block
    summary(workshop, tmp_path / "int8", "wire.format=int8", progress=quiet)
    assert not any("of its update" in line for line in quiet.lines)


@pytest.mark.parametrize(("overrides", "mode", "delta"), [(CENTRAL, "central", 1e-5), (LOCAL, "local", 1e-6)])
def test_epsilon_stands_in_every_round_and_in_the_summary(
    overrides: tuple[str, ...], mode: str, delta: float, workshop: Workshop, tmp_path: Path
):
    found = summary(workshop, tmp_path / "run", *overrides)
    accountant = Accountant(0.1, mode, delta)
    rows = metrics_of(tmp_path / "run")
    assert [row["epsilon"] for row in rows] == [accountant.epsilon(t + 1) for t in range(6)]
    assert (found["epsilon"], found["delta"]) == (accountant.epsilon(6), delta)
    key = tmp_path / "run" / "privacy.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    again = summary(workshop, tmp_path / "again", *overrides)
    assert again["model_sha256"] != found["model_sha256"], "another run draws other noise, whatever its seed"


def test_a_client_that_is_asked_less_often_has_spent_less(workshop: Workshop, tmp_path: Path):
    found = summary(workshop, tmp_path / "run", *CENTRAL, "federation.participation=0.5")
    rounds_of = [sum(i in row["participants"] for row in metrics_of(tmp_path / "run")) for i in range(4)]
    assert max(rounds_of) < 6
    assert found["epsilon"] == Accountant(0.1, "central", 1e-5).epsilon(max(rounds_of))


@pytest.mark.parametrize("overrides", [CENTRAL, LOCAL], ids=["central", "local"])
def test_a_resumed_run_adds_the_same_noise(
    overrides: tuple[str, ...], workshop: Workshop, tmp_path: Path, known_key: None
):
    whole = summary(workshop, tmp_path / "whole", *overrides)
    stopped = summary(workshop, tmp_path / "run", *overrides, asked_to_stop=after(2))
    assert stopped["status"] == "interrupted"
    resumed = resume(tmp_path / "run")
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert resumed["epsilon"] == whole["epsilon"]


def test_without_its_key_a_run_cannot_go_on(workshop: Workshop, tmp_path: Path):
    summary(workshop, tmp_path / "run", *CENTRAL, asked_to_stop=after(2))
    (tmp_path / "run" / "privacy.key").unlink()
    with pytest.raises(CheckpointError, match=r"privacy\.key cannot be read"):
        resume(tmp_path / "run")


def test_what_is_not_installed_is_said_before_anything_is_written(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "dp_accounting" else found(name, *rest)
    )
    with pytest.raises(
        ConfigError, match=r"needs dp_accounting; install it with: pip install 'parablock\[privacy\]'"
    ):
        summary(workshop, tmp_path / "run", *CENTRAL)
    assert not (tmp_path / "run").exists()


GRID = ("privacy.clip_norm=2.0", "wire.streaming=false")
MASKED = ("privacy.secure_aggregation=masked",)


def test_masked_runs_end_as_the_plain_grid_bitwise_also_when_resumed_and_near_the_run_without(
    workshop: Workshop, tmp_path: Path
):
    without = summary(workshop, tmp_path / "without")
    plain = summary(workshop, tmp_path / "plain", *GRID, "privacy.secure_aggregation=plain")
    masked = summary(workshop, tmp_path / "masked", *GRID, "privacy.secure_aggregation=masked")
    assert masked["model_sha256"] == plain["model_sha256"] != without["model_sha256"]
    assert masked["final_eval_loss"] == pytest.approx(without["final_eval_loss"], rel=0.02)
    assert masked["uplink_bytes"] > plain["uplink_bytes"]
    again = (*GRID, "privacy.secure_aggregation=masked")
    stopped = summary(workshop, tmp_path / "run", *again, asked_to_stop=after(2))
    assert stopped["status"] == "interrupted"
    assert resume(tmp_path / "run")["model_sha256"] == masked["model_sha256"]


def test_noise_on_a_masked_sum_is_that_on_the_plain_grid(workshop: Workshop, tmp_path: Path, known_key: None):
    noisy = (*GRID, "privacy.noise_multiplier=0.1")
    plain = summary(workshop, tmp_path / "plain", *noisy, "privacy.secure_aggregation=plain")
    masked = summary(workshop, tmp_path / "masked", *noisy, "privacy.secure_aggregation=masked")
    quiet = summary(workshop, tmp_path / "quiet", *GRID, "privacy.secure_aggregation=plain")
    assert masked["model_sha256"] == plain["model_sha256"] != quiet["model_sha256"]
    assert masked["epsilon"] == plain["epsilon"]


DISTRIBUTED = (*GRID, *MASKED, "privacy.noise_multiplier=0.1", "privacy.mode=distributed")


def test_noise_of_the_clients_in_a_masked_sum_is_counted_and_repeated_when_resumed(
    workshop: Workshop, tmp_path: Path, known_key: None
):
    whole = summary(workshop, tmp_path / "whole", *DISTRIBUTED)
    assert [row["epsilon"] for row in metrics_of(tmp_path / "whole")] == [
        Accountant(0.1, "distributed", 1e-5).epsilon(t + 1) for t in range(6)
    ]
    assert Accountant(0.1, "distributed", 1e-5).epsilon(6) == Accountant(0.1, "central", 1e-5).epsilon(6)
    quiet = summary(workshop, tmp_path / "quiet", *GRID, *MASKED)
    assert quiet["model_sha256"] != whole["model_sha256"] and "epsilon" not in quiet
    summary(workshop, tmp_path / "run", *DISTRIBUTED, asked_to_stop=after(2))
    resumed = resume(tmp_path / "run")
    assert (resumed["model_sha256"], resumed["epsilon"]) == (whole["model_sha256"], whole["epsilon"])


STAND_INS = (
    "federation.num_rounds=12",
    "federation.participation=0.75",
    "federation.delay=0",
    "federation.min_updates=2",
    "federation.deadline_factor=2",
    "engine.clock=virtual",
    "engine.step_time_s=1",
)


def drawn(num_rounds: int, participation: float) -> list[tuple[int, ...]]:
    return [cohort(t, num_clients=4, participation=participation, seed=0) for t in range(num_rounds)]


def losses(rounds: list[tuple[int, ...]], clients: tuple[int, ...], **fault: Any) -> list[dict[str, Any]]:
    """Lose clients one after another, each in a round that has two others left."""
    found: list[dict[str, Any]] = []
    for client_id in clients:
        gone = {each["client"] for each in found}
        begin = found[-1]["round"] + 1 if found else 1
        left = [set(asked) - gone for asked in rounds]
        t = next(t for t in range(begin, len(rounds)) if client_id in left[t] and len(left[t]) == 3)
        found.append({"client": client_id, "round": t, **fault})
    return found


def test_epsilon_counts_who_was_asked_and_stand_ins_are(workshop: Workshop, tmp_path: Path):
    faults = losses(drawn(12, 0.75), (3, 2), at="train", kind="kill")
    options = (*STAND_INS, *LOCAL, f"faults={faults}")
    found = summary(workshop, tmp_path / "run", *options)
    rows = metrics_of(tmp_path / "run")
    released = Counter(i for row in rows for i in row["participants"])
    of_drawn = Counter(i for asked in drawn(12, 0.75) for i in asked)
    assert max(released.values()) > max(of_drawn.values()), "or the test shows nothing"
    account = Accountant(0.1, "local", 1e-6)
    assert found["epsilon"] == account.epsilon(max(released.values())) > account.epsilon(max(of_drawn.values()))


def test_masked_cohorts_have_no_stand_ins_and_rounds_without_enough_of_them_are_void(
    workshop: Workshop, tmp_path: Path
):
    faults = losses(drawn(12, 0.75), (3, 2), at="upload", kind="drop", value=100000.0)
    found = summary(workshop, tmp_path / "run", *STAND_INS, *DISTRIBUTED, f"faults={faults}")
    assert (found["status"], found["rounds_done"]) == ("completed", 12)
    participants = [set(row["participants"]) for row in metrics_of(tmp_path / "run")]
    for asked, counted in zip(drawn(12, 0.75), participants, strict=True):
        assert counted <= set(asked)
        assert len(counted) in (0, 2, 3)
    after = participants[faults[-1]["round"] + 1 :]
    assert set() in after and {0, 1} in after
    # a void round has asked for no shares: what is released are the sums of the others, with who is in them
    released = Counter(i for counted in participants for i in counted)
    of_drawn = Counter(i for asked in drawn(12, 0.75) for i in asked)
    assert max(released.values()) < max(of_drawn.values()), "or the test shows nothing"
    assert found["epsilon"] == Accountant(0.1, "distributed", 1e-5).epsilon(max(released.values()))


def test_a_checkpoint_without_the_log_of_what_was_released_cannot_go_on(workshop: Workshop, tmp_path: Path):
    summary(workshop, tmp_path / "run", *LOCAL, asked_to_stop=after(2))
    log = tmp_path / "run" / "audit.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"account"', '"accounts"', 1))
    with pytest.raises(StorageError, match=r"audit\.jsonl, line \d+: it has changed"):
        resume(tmp_path / "run")
    for path in (log, log.with_name("audit.jsonl.head")):
        path.unlink()
    with pytest.raises(CheckpointError, match="does not hold what the checkpoint says"):
        resume(tmp_path / "run")


def test_a_run_that_hides_nothing_keeps_no_log(workshop: Workshop, tmp_path: Path):
    summary(workshop, tmp_path / "plain")
    assert not (tmp_path / "plain" / "audit.jsonl").exists()
