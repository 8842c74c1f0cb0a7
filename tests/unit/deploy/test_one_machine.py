"""What `parablock deploy` writes, starts and ends: the Flower app, a site's process, what an earlier run left."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

import pytest

from parablock import __version__
from parablock.config.load import parse_config
from parablock.deploy.one_machine import Deployment, prepare_app, resume_local, watch
from parablock.deploy.processes import check_site_keys, write_app
from parablock.deploy.server_app import only_one
from parablock.deploy.site import load_site, site_file
from parablock.deploy.variables import config_file, failure_file, output_dir_of
from parablock.errors import ConfigError, InputError, ParaBlockError, StorageError
from parablock.experiment.progress import LoggedProgress
from parablock.storage.files import claimed
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


def test_a_simulated_supernode_has_the_site_that_the_app_prepared(tmp_path: Path):
    folder, num_sites = prepare_app(parse_config(CONFIG | {"federation": {"num_clients": 3}}), tmp_path / "run")
    run_config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert num_sites == 3
    assert [load_site(site_file({"partition-id": i}, run_config)).client_id for i in range(3)] == [0, 1, 2]
    assert output_dir_of({}, run_config) == tmp_path / "run"
    assert output_dir_of({"PARABLOCK_OUTPUT_DIR": "/other"}, run_config) == Path("/other")
    with pytest.raises(ConfigError, match="deploy server"):
        output_dir_of({}, {"output-dir": ""})


def test_two_flower_runs_do_not_write_one_run_directory(tmp_path: Path):
    refused = pytest.raises(StorageError, match="another process is at work")
    with only_one(tmp_path / "run"), only_one(tmp_path / "other"), refused, only_one(tmp_path / "run"):
        pass
    with only_one(tmp_path / "run"):
        pass


def test_a_leftover_of_a_deployment_is_ended_and_a_stranger_with_its_number_is_not(tmp_path: Path):
    deployment = Deployment(tmp_path / "run", 1)
    deployment.folder.mkdir(parents=True)
    (deployment.folder / "flower").touch()
    wait = [sys.executable, "-c", "print(flush=True); input()"]
    with ExitStack() as stack:
        ours, stranger = (
            stack.enter_context(subprocess.Popen([*wait, word], stdin=PIPE, stdout=PIPE, start_new_session=True))
            for word in (str(deployment.site_file(0)), f"{deployment.folder}-of-another")
        )
        for process in (ours, stranger):
            process.stdout.readline()
        numbers = {"superlink": ours.pid, "supernode-0": stranger.pid}
        (deployment.folder / "processes.json").write_text(json.dumps(numbers))
        with pytest.raises(FileExistsError), deployment:  # what was left is ended first; then it cannot start
            pass
        assert ours.wait(10) == -signal.SIGKILL
        assert stranger.poll() is None
        stranger.communicate(b"\n")
    assert stranger.returncode == 0


def test_what_a_server_of_real_sites_left_is_not_resumed_as_if_they_were_here(tmp_path: Path):
    config = parse_config(CONFIG)
    directory = RunDirectory(tmp_path / "run")
    directory.create(config.to_yaml(), {})
    config_file(directory.path).parent.mkdir()
    config_file(directory.path).write_text(config.to_yaml())
    with pytest.raises(
        ConfigError, match=r"not on this machine; start the SuperLink again with `parablock deploy ser"
    ):
        resume_local(directory.path)


def test_a_deployment_that_somebody_still_watches_is_not_resumed(tmp_path: Path):
    config, directory = parse_config(CONFIG), RunDirectory(tmp_path / "run")
    directory.create(config.to_yaml(), {})
    deployment = Deployment(directory.path, 1, insecure=True)
    deployment.prepare(config)
    (deployment.folder / "flower").touch()  # what is brought up fails here
    with claimed(deployment.folder), pytest.raises(StorageError, match="another process is at work"):
        resume_local(directory.path)
    with pytest.raises(FileExistsError):
        resume_local(directory.path)


def test_what_stopped_the_server_is_said_by_who_watches(tmp_path: Path):
    deployment = Deployment(tmp_path / "run", 1)
    deployment.folder.mkdir(parents=True)
    word = {"what": "client 1 has given up", "cause": "c", "remedy": "r", "exit_code": 2}
    failure_file(deployment.output_dir).write_text(json.dumps(word))
    with pytest.raises(InputError, match="client 1 has given up"):
        watch(deployment, "1", LoggedProgress())
    with pytest.raises(ParaBlockError, match="the SuperLink ended"):  # the word is taken away with that
        deployment.log("superlink").parent.mkdir()
        deployment.log("superlink").touch()
        watch(deployment, "1", LoggedProgress())


def test_a_site_that_is_told_to_end_ends_with_its_process():
    program = (
        "import os, sys; from parablock.deploy.processes import keep_running; "
        "waits = 'print(flush=True); import time; time.sleep(60)'; "
        "keep_running([([sys.executable, '-c', waits], os.environ)] * 2, tell=print)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=PIPE) as site:
        assert site.stdout.readline() + site.stdout.readline() == b"\n\n"
        site.terminate()
        assert site.wait(10) == 128 + signal.SIGTERM
        assert site.stdout.read() == b""  # closed: nobody is left who could write


def test_a_folder_without_a_sites_keys_is_refused(tmp_path: Path):
    (tmp_path / "ca.pem").touch()
    with pytest.raises(ConfigError, match=r"has no site\.key; give a folder site-N"):
        check_site_keys(tmp_path, 1)
    (tmp_path / "site.key").touch()
    check_site_keys(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"has no down\.key"):
        check_site_keys(tmp_path, 2)
    (tmp_path / "down.key").touch()
    check_site_keys(tmp_path, 2)
