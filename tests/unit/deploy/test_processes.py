"""What `parablock deploy` writes and starts: commands, and the environment of Flower's processes."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from parablock.deploy.one_machine import Deployment
from parablock.deploy.processes import (
    ServerFiles,
    make_flower_keys,
    run_status,
    server_processes,
    site_processes,
    superlink_command,
    supernode_command,
    write_connection,
)
from parablock.deploy.variables import site_file_of
from parablock.errors import StorageError


def test_a_server_that_does_not_answer_leaves_the_status_unknown(tmp_path: Path):
    files = ServerFiles(tmp_path, None, "127.0.0.1:9")
    write_connection(files)
    assert run_status(files, "1") == "unknown"


def test_the_defaults_are_the_safe_ones(tmp_path: Path):
    server = server_processes(ServerFiles(tmp_path, tmp_path, "0.0.0.0:8000"), "127.0.0.1:8000", {"A": "1"})
    site = site_processes(tmp_path / "home", "host:8000", tmp_path, tmp_path / "site.yaml", 9094)
    (superlink, env), (helper, _) = server["superlink"], server["helper"]
    assert "--enable-supernode-auth" in superlink and "--ssl-certfile" in superlink and "--database" in superlink
    assert "--root-certificates" in helper and env["A"] == "1"
    (supernode, _), (site_helper, _) = site["supernode"], site["helper"]
    assert "--root-certificates" in supernode and "--auth-supernode-private-key" in supernode
    assert "--insecure" not in superlink + helper + supernode
    assert "--insecure" in superlink_command(ServerFiles(tmp_path, None, "127.0.0.1:8000"))
    assert "--insecure" in site_helper and "127.0.0.1:9094" in site_helper
    told = supernode[supernode.index("--node-config") + 1]
    assert told == f'site="{tmp_path / "site.yaml"}" server-host="host"'
    assert 'server-host="::1"' in " ".join(supernode_command("[::1]:8000", None, tmp_path, 9094, tmp_path))


def test_a_process_and_its_helper_share_a_secret_that_no_other_user_reads(tmp_path: Path):
    site = site_processes(tmp_path / "home", "host:8000", None, tmp_path / "site.yaml", 9094)
    files = {command[command.index("--superexec-auth-secret-file") + 1] for command, _ in site.values()}
    (secret,) = map(Path, files)
    assert len(secret.read_bytes()) == 32 and secret.stat().st_mode & 0o077 == 0
    other = site_processes(tmp_path / "other", "host:8000", None, tmp_path / "site.yaml", 9095)["helper"][0]
    assert Path(other[other.index("--superexec-auth-secret-file") + 1]).read_bytes() != secret.read_bytes()
    assert all("process" in command for command, _ in [site["supernode"]])


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


def test_flowers_keys_make_a_connection_that_only_their_authority_vouches_for(tmp_path: Path):
    keys = tmp_path / "keys"
    make_flower_keys(keys, 2, ["localhost", "127.0.0.1"])
    make_flower_keys(tmp_path / "other", 1, ["localhost"])
    public = [load_ssh_public_key(path.read_bytes()) for path in sorted(keys.glob("server/site-*.pub"))]
    for number, of_node in enumerate(public):
        private = load_ssh_private_key((keys / f"site-{number}" / "node.key").read_bytes(), None)
        assert [private.public_key() == key for key in public] == [key is of_node for key in public]
    secrets = list(keys.rglob("*.key"))
    assert len(secrets) == 4 and all(secret.stat().st_mode & 0o077 == 0 for secret in secrets)
    assert _handshake(keys, keys / "site-0" / "authority.pem") == ""
    assert "certificate verify failed" in _handshake(keys, tmp_path / "other" / "site-0" / "authority.pem")
    with pytest.raises(StorageError, match="not empty"):
        make_flower_keys(keys, 1, ["localhost"])


def _handshake(keys: Path, authority: Path) -> str:
    """Shake hands in memory; give why it fails."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(keys / "server" / "server.pem", keys / "server" / "server.key")
    client = ssl.create_default_context(cafile=str(authority))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return str(error)
    return ""
