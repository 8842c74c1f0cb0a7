"""A direct deployment on this machine, by real processes: it ends as one process does, or says why it cannot."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from parablock.config.load import at_sites, load_config
from parablock.deploy.direct_local import LocalSites, deploy_direct, resume_direct
from parablock.deploy.status import control_of, read_status
from parablock.errors import CheckpointError, ConfigError, InputError, ParaBlockError, StorageError
from parablock.privacy.accounting import Accountant
from parablock.storage.audit_log import verify
from parablock.storage.files import lock_folder
from parablock.storage.run_directory import RunDirectory
from tiny_runs import Workshop, command, noise_keys, noise_under

SMALL = ["federation.num_clients=2", "federation.min_updates=2", "data.partition={scheme: iid}"]


def configured(workshop: Workshop, *overrides: str):
    return load_config(workshop.config, [*SMALL, *overrides, *at_sites("remote")])


def model_of(output_dir: Path) -> str:
    return json.loads((output_dir / "summary.json").read_text())["model_sha256"]


def in_process(workshop: Workshop, output_dir: Path, *overrides: str) -> str:
    assert workshop.run(output_dir, *SMALL, *overrides).code == 0
    return model_of(output_dir)


@pytest.mark.parametrize(
    "overrides",
    [
        ("federation.delay=0",),
        ("federation.delay=1", "wire.format=int8"),
        ("federation.method=flora", "federation.delay=0", "wire.format=int8"),
    ],
)
def test_real_processes_with_tls_make_the_model_of_one_process(tmp_path: Path, workshop: Workshop, overrides):
    summary = deploy_direct(configured(workshop, *overrides), tmp_path / "deployed")
    assert summary["model_sha256"] == in_process(workshop, tmp_path / "one", *overrides)
    assert summary["model_sha256"] != in_process(workshop, tmp_path / "other", *overrides, "seed=1")
    status = read_status(tmp_path / "deployed")
    assert not status["running"] or status["pid"] == os.getpid()
    assert all(site["up_bytes"] > 0 and site["last_round"] == 5 for site in status["sites"])
    logs = sorted((tmp_path / "deployed" / "deployment").rglob("audit.jsonl"))
    assert len(logs) == 3 and all(verify(log).bad_line is None for log in logs)
    server, *sites = (Counter(entry.kind for entry in verify(log).entries) for log in logs)
    assert server["session"] == 1 and server["commit"] == 6 and server["door"] >= 2
    assert all((site["join"], site["round"], site["end"]) == (1, 6, 1) for site in sites)


def test_masked_updates_of_real_processes_make_the_model_of_one_process(tmp_path: Path, workshop: Workshop):
    masked = ("privacy.secure_aggregation=masked", "privacy.clip_norm=1.0", "federation.num_clients=3")
    masked = (*masked, "wire.streaming=false")
    summary = deploy_direct(configured(workshop, *masked), tmp_path / "deployed", insecure=True)
    assert summary["model_sha256"] == in_process(workshop, tmp_path / "one", *masked)


def test_sites_add_noise_of_their_own_keys_to_a_masked_sum_and_all_account_for_it(
    tmp_path: Path, workshop: Workshop
):
    """The model is that of one process whose clients have the keys of the sites, and of no other keys."""
    noise = ("privacy.noise_multiplier=0.5", "privacy.mode=distributed", "federation.num_rounds=4")
    masked = ("privacy.secure_aggregation=masked", "privacy.clip_norm=1.0", "federation.num_clients=3")
    masked = (*masked, "wire.streaming=false", *noise)
    summary = deploy_direct(configured(workshop, *masked), tmp_path / "deployed", insecure=True)
    assert summary["epsilon"] == Accountant(0.5, "distributed", 1e-5).epsilon(4)
    deployment = tmp_path / "deployed" / "deployment"
    keys = noise_keys(deployment / "state")
    assert len(keys) == len(set(keys.values())) == 3
    with noise_under(keys):
        assert summary["model_sha256"] == in_process(workshop, tmp_path / "own", *masked)
    with noise_under(dict.fromkeys(keys, keys[0])):
        assert summary["model_sha256"] != in_process(workshop, tmp_path / "shared", *masked)
    sites = [verify(log).entries for log in deployment.rglob("audit.jsonl") if log.parent != deployment]
    counted = [[e.facts["noise_multiplier"] for e in entries if e.kind == "round"] for entries in sites]
    assert counted == [[0.5] * 4] * 3


def test_a_run_that_is_stopped_goes_on_with_the_same_model(tmp_path: Path, workshop: Workshop):
    output_dir, asked = tmp_path / "deployed", []

    def stop() -> bool:
        rows = RunDirectory(output_dir).metrics
        if not asked and rows.exists() and len(rows.read_text().splitlines()) >= 2:
            control_of(output_dir).ask("stop")  # as `parablock deploy stop` does
            asked.append(True)
        return False

    assert deploy_direct(configured(workshop), output_dir, asked_to_stop=stop)["status"] == "interrupted"
    assert resume_direct(output_dir)["status"] == "completed"
    assert model_of(output_dir) == in_process(workshop, tmp_path / "one")


def test_a_site_that_cannot_take_part_ends_a_run_that_is_here_with_its_own_words(
    tmp_path: Path, workshop: Workshop, monkeypatch
):
    prepare = LocalSites.prepare

    def without_data(self: LocalSites) -> None:
        prepare(self)
        file = self.site_file(1)
        file.write_text(file.read_text().replace(str(workshop.client_file(0)), str(tmp_path / "missing.jsonl")))

    monkeypatch.setattr(LocalSites, "prepare", without_data)
    with pytest.raises(ParaBlockError, match=r"(?s)the process of site 1 ended.*missing\.jsonl"):
        deploy_direct(configured(workshop), tmp_path / "deployed")
    log = (tmp_path / "deployed" / "deployment" / "server.log").read_text()
    assert "missing" not in log, "no path of a site reaches the server"


def test_what_is_wrong_before_the_start_leaves_nothing_behind(tmp_path: Path, workshop: Workshop):
    with pytest.raises(InputError):
        deploy_direct(configured(workshop, "federation.num_rounds=1"), tmp_path / "deployed")
    assert not (tmp_path / "deployed").exists()
    with pytest.raises(ConfigError):
        configured(workshop, "faults=[{client: 0, round: 1, at: train, kind: drop}]")


def test_a_second_deployment_leaves_the_first_one_s_files_alone(tmp_path: Path, workshop: Workshop):
    keys = tmp_path / "deployed" / "deployment" / "keys"
    keys.mkdir(parents=True)
    with lock_folder(keys.parent), pytest.raises(StorageError, match="another process is at work"):
        deploy_direct(configured(workshop), tmp_path / "deployed")
    assert keys.exists()
    with pytest.raises(InputError):
        deploy_direct(configured(workshop, "federation.num_rounds=1"), tmp_path / "deployed")
    assert not keys.exists(), "without the other process, what no run has begun with is removed"


def test_a_server_of_real_sites_is_not_resumed_as_if_they_were_here(tmp_path: Path, workshop: Workshop):
    directory = RunDirectory(tmp_path / "run")
    directory.create(configured(workshop).to_yaml(), {})
    with pytest.raises(CheckpointError, match="not on this machine"):
        resume_direct(directory.path)
    assert command("resume", str(directory.path)).code == 2


def test_a_killed_site_is_waited_for_and_changes_nothing(tmp_path: Path, workshop: Workshop, monkeypatch):
    """As an operator's service manager would, the test starts the site again."""
    output_dir, killed, sites = tmp_path / "deployed", [], []
    start = LocalSites.start
    monkeypatch.setattr(LocalSites, "start", lambda self, *a: (sites.append((self, a)), start(self, *a))[1])
    monkeypatch.setattr(LocalSites, "check", lambda self: None)

    def kill_once() -> bool:
        rows = RunDirectory(output_dir).metrics
        if not killed and rows.exists() and len(rows.read_text().splitlines()) >= 2:
            here, (client_id, address) = sites[0]
            os.killpg(here.processes[client_id].pid, signal.SIGKILL)
            here.processes[client_id].wait()
            killed.append(time.monotonic())
            here.start(client_id, address)
        return False

    deploy_direct(configured(workshop, "federation.num_rounds=12"), output_dir, asked_to_stop=kill_once)
    assert killed
    assert model_of(output_dir) == in_process(workshop, tmp_path / "one", "federation.num_rounds=12")
    assert "client 0 is back" in (output_dir / "deployment" / "server.log").read_text()
