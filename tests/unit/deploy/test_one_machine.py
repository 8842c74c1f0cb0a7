"""A deployment whose server and sites are on one machine."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest

from parablock import __version__
from parablock.config.load import parse_config
from parablock.deploy.one_machine import Deployment, prepare_app, resume_local, watch
from parablock.deploy.processes import write_app
from parablock.deploy.variables import client_of_node, config_file, data_port_of, failure_file, output_dir_of
from parablock.errors import ConfigError, InputError, ParaBlockError, StorageError
from parablock.experiment.progress import LoggedProgress
from parablock.storage.files import lock_folder
from parablock.storage.run_directory import RunDirectory

CONFIG = {"model": {"name_or_path": "/model"}, "data": {"train": ["/rows.jsonl"]}, "engine": {"name": "flower"}}


def test_the_app_is_one_that_flower_takes_and_names_what_is_there(tmp_path: Path):
    content = tomllib.loads((write_app(tmp_path / "app") / "pyproject.toml").read_text())
    assert content["project"]["version"] == __version__
    assert content["project"]["dependencies"] == [f"parablock[flower]=={__version__}"]
    for component in content["tool"]["flwr"]["app"]["components"].values():
        module, _, name = component.partition(":")
        assert name == "app"
        assert importlib.util.find_spec(module) is not None
        assert importlib.util.find_spec(f"{module}s") is None


def test_an_app_for_a_federation_names_its_run_directory_and_no_site(tmp_path: Path):
    folder, num_sites = prepare_app(parse_config(CONFIG | {"federation": {"num_clients": 3}}), tmp_path / "run")
    run_config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert num_sites == 3
    assert output_dir_of({}, run_config) == tmp_path / "run"
    assert output_dir_of({"PARABLOCK_OUTPUT_DIR": "/other"}, run_config) == Path("/other")
    assert (data_port_of(run_config), client_of_node(run_config)) == (0, {})
    assert not (folder.parent / "sites").exists()
    with pytest.raises(ConfigError, match="deploy app"):
        output_dir_of({}, {"output-dir": ""})


def test_the_app_says_at_which_port_and_which_node_each_client_is(tmp_path: Path):
    app = tomllib.loads((write_app(tmp_path, "/run", "0=12 1=34") / "pyproject.toml").read_text())
    assert client_of_node(app["tool"]["flwr"]["app"]["config"]) == {12: 0, 34: 1}
    assert client_of_node({"nodes": "1=5, 0=7"}) == {5: 1, 7: 0}
    for wrong in ("0", "0=", "=1", "a=1", "0=1 0=2", "0=1 1=1"):
        with pytest.raises(ConfigError, match="CLIENT=NODE"):
            client_of_node({"nodes": wrong})
    assert data_port_of({"data-port": 9000}) == 9000
    for port in (-1, 65536, "9000"):
        with pytest.raises(ConfigError, match="no port"):
            data_port_of({"data-port": port})


def test_what_a_server_of_real_sites_left_is_not_resumed_as_if_they_were_here(tmp_path: Path):
    config = parse_config(CONFIG)
    directory = RunDirectory(tmp_path / "run")
    directory.create(config.to_yaml(), {})
    config_file(directory.path).parent.mkdir()
    config_file(directory.path).write_text(config.to_yaml())
    with pytest.raises(ConfigError, match=r"not on this machine; start its SuperLink again and submit"):
        resume_local(directory.path)


def test_a_deployment_that_somebody_still_watches_is_not_resumed(tmp_path: Path):
    config, directory = parse_config(CONFIG), RunDirectory(tmp_path / "run")
    directory.create(config.to_yaml(), {})
    deployment = Deployment(directory.path, 1, insecure=True)
    deployment.prepare(config)
    (deployment.folder / "flower").touch()  # what is brought up fails here
    with lock_folder(deployment.folder), pytest.raises(StorageError, match="another process is at work"):
        resume_local(directory.path)
    with pytest.raises(FileExistsError):
        resume_local(directory.path)


def test_what_stopped_the_server_is_said_by_who_watches(tmp_path: Path):
    deployment = Deployment(tmp_path / "run", 1)
    deployment.folder.mkdir(parents=True)
    word = {"what": "client 1 has given up", "lines": ["a"], "cause": "c", "remedy": "r", "exit_code": 2}
    failure_file(deployment.output_dir).write_text(json.dumps(word))
    with pytest.raises(InputError, match="client 1 has given up\na\nc\nr"):
        watch(deployment, "1", LoggedProgress())
    with pytest.raises(ParaBlockError, match="the SuperLink ended"):  # the word is taken away with that
        deployment.log("superlink").parent.mkdir()
        deployment.log("superlink").touch()
        watch(deployment, "1", LoggedProgress())
