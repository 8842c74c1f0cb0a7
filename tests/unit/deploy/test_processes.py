"""What `parablock deploy` writes and starts: commands, and the environment of Flower's processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

import pytest

from parablock.deploy.one_machine import Deployment
from parablock.deploy.processes import (
    LARGE_PAGES,
    TUNABLES,
    ServerFiles,
    check_site_keys,
    environment,
    run_status,
    superlink_command,
    supernode_command,
    supernodes_of,
    write_connection,
)
from parablock.deploy.variables import site_file_of
from parablock.errors import ConfigError


def test_what_a_user_asks_of_the_c_library_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TUNABLES, "glibc.malloc.arena_max=2")
    assert environment(tmp_path)[TUNABLES] == f"{LARGE_PAGES}:glibc.malloc.arena_max=2"


def test_a_server_that_does_not_answer_leaves_the_status_unknown(tmp_path: Path):
    files = ServerFiles(tmp_path, None, "127.0.0.1:9")
    write_connection(files)
    assert run_status(files, "1") == "unknown"


def test_the_defaults_are_the_safe_ones(tmp_path: Path):
    server = superlink_command(ServerFiles(tmp_path, tmp_path, "127.0.0.1:8000"))
    site = supernode_command("host:8000", tmp_path, tmp_path / "site.yaml", 9094)
    assert "--enable-supernode-auth" in server and "--ssl-certfile" in server
    assert "--root-certificates" in site and "--auth-supernode-private-key" in site
    assert "--insecure" not in server + site
    assert "--insecure" in superlink_command(ServerFiles(tmp_path, None, "127.0.0.1:8000"))
    assert site[site.index("--node-config") + 1] == f'site="{tmp_path / "site.yaml"}" carries="both"'


def test_each_supernode_of_a_site_has_a_key_a_folder_and_a_port_of_its_own(tmp_path: Path):
    (up, up_env), (down, down_env) = supernodes_of(tmp_path / "home", "host:8000", tmp_path, tmp_path, 9094, 2)
    for option in ("--port", "--auth-supernode-private-key", "--node-config"):
        assert up[up.index(option) + 1] != down[down.index(option) + 1]
    assert up_env["FLWR_HOME"] != down_env["FLWR_HOME"]
    assert [words[-1] for words in (up, down)] == [str(tmp_path / "site.key"), str(tmp_path / "down.key")]
    ((both, _),) = supernodes_of(tmp_path / "home", "host:8000", None, tmp_path, 9094, 1)
    assert 'carries="both"' in both[both.index("--node-config") + 1]


def test_a_leftover_of_a_deployment_is_ended_and_a_stranger_with_its_number_is_not(tmp_path: Path):
    deployment = Deployment(tmp_path / "run", 1)
    deployment.folder.mkdir(parents=True)
    (deployment.folder / "flower").touch()
    wait = [sys.executable, "-c", "print(flush=True); input()"]
    with ExitStack() as stack:
        ours, stranger = (
            stack.enter_context(subprocess.Popen([*wait, word], stdin=PIPE, stdout=PIPE, start_new_session=True))
            for word in (str(site_file_of(deployment.output_dir, 0)), f"{deployment.folder}-of-another")
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
