"""A site and its file: what the server tells it, and what it brings itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from parablock.config.load import load_server_config, parse_config
from parablock.deploy.site import configuration_at, is_simulated, load_site, shared_config, site_file
from parablock.deploy.site_check import check_site
from parablock.errors import ConfigError
from tiny_runs import Workshop

SERVER = {
    "model": {"name_or_path": "/server/model"},
    "data": {"train": [], "test": ["/server/test.jsonl"], "max_length": 64},
    "engine": {"name": "flower"},
    "report_to": ["tensorboard"],
    "seed": 5,
}


def test_the_server_tells_no_path_and_a_site_brings_its_own(tmp_path: Path):
    shared = shared_config(parse_config(SERVER))
    assert "/server" not in shared and "tensorboard" not in shared
    file = tmp_path / "site.yaml"
    site = {"client_id": 1, "state_dir": "state", "model": {"name_or_path": "/site/model"}, "num_threads": 3}
    file.write_text(yaml.safe_dump({**site, "data": {"train": ["/site/rows.jsonl"]}}))
    loaded = load_site(file)
    config = configuration_at(loaded, shared)
    assert loaded.state_dir == tmp_path / "state"
    assert (config.model.name_or_path, config.data.train) == ("/site/model", ("/site/rows.jsonl",))
    assert (config.seed, config.data.max_length, config.engine.num_threads) == (5, 64, 3)


def test_a_server_without_rows_of_its_own_needs_some_to_score_on(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name_or_path: m}\ndata: {test: [t.jsonl]}\n")
    config = load_server_config(file, engine="flower")
    assert (config.data.train, config.engine.name) == ((), "flower")
    file.write_text("model: {name_or_path: m}\ndata: {max_length: 64}\n")
    with pytest.raises(ConfigError, match=r"data\.train: names no file"):
        load_server_config(file)


def test_everything_wrong_in_a_sites_file_is_said_at_once(tmp_path: Path):
    file = tmp_path / "site.yaml"
    file.write_text("client_id: -1\nstate_dirr: x\n")
    with pytest.raises(ConfigError) as caught:
        load_site(file)
    said = str(caught.value)
    assert "client_id" in said and "did you mean `state_dir`" in said and "model: required" in said


def test_a_supernode_without_a_site_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PARABLOCK_SITE", raising=False)
    with pytest.raises(ConfigError, match="--node-config"):
        site_file({})
    monkeypatch.setenv("PARABLOCK_SITE", "/a.yaml")
    assert site_file({}) == Path("/a.yaml")
    assert site_file({"site": "/b.yaml", "partition-id": 1}) == Path("/b.yaml")


def test_a_node_of_a_simulation_stands_for_no_site(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PARABLOCK_SITE", raising=False)
    simulated = {"partition-id": 1, "num-partitions": 4}
    assert is_simulated(simulated)
    assert not is_simulated(simulated | {"site": "/site.yaml"})
    assert not is_simulated({"partition-id": 1})


@pytest.mark.parametrize(("max_length", "least", "is_good"), [(64, 1, True), (64, 1000, False), (8, 1, False)])
def test_a_check_counts_the_rows_that_can_be_learnt(
    workshop: Workshop, tmp_path: Path, max_length: int, least: int, is_good: bool
):
    """As many rows as a file has may be too long for the run, and the policy asks for some that are learnt."""
    site = {"client_id": 0, "state_dir": str(tmp_path / "state"), "model": {"name_or_path": str(workshop.model)}}
    site |= {"data": {"train": [str(workshop.client_file(0))]}, "policy": {"min_examples_per_round": least}}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    run = {"model": site["model"], "data": {"max_length": max_length, "test": [str(workshop.test_file)]}}
    run |= {"federation": {"num_clients": 2}, "engine": {"name": "remote"}}
    run["train"] = {"num_local_steps": 8, "per_device_train_batch_size": 200}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    found = list(check_site(tmp_path / "site.yaml", "127.0.0.1:1", None, tmp_path / "run.yaml"))
    rows = len(workshop.client_file(0).read_text().splitlines())
    assert any(one.is_good and f"{rows} rows to train on" in one.found for one in found)
    (learnt,) = [one for one in found if "can be learnt" in one.found or "None of" in one.found]
    assert learnt.is_good is is_good
    assert (f"{rows} of {rows} rows can be learnt with data.max_length 64" in learnt.found) is (max_length == 64)
    assert ("min_examples_per_round is 1000" in learnt.remedy) is (least == 1000)
