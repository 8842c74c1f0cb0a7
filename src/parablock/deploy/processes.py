"""Flower's own commands with safe defaults: TLS, node keys and secrets on, telemetry and update checks off.

A SuperLink and each SuperNode have a helper beside them, Flower's `flower-superexec`, which starts the apps. Both
know a secret, so that no other user of the machine can take a task; and as the SuperLink has a database, it may be
away for a while.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parablock import __version__
from parablock.deploy.variables import DATA_PORT_KEY, NODES_KEY, OUTPUT_KEY
from parablock.errors import InputError, ParaBlockError
from parablock.printable import as_argument
from parablock.storage.files import last_lines

CONNECTION = "parablock"
"""The name of the server in the Flower configuration that we write."""
PYTHON = Path(sys.executable)
"""The Python that Flower's commands are beside."""
NO_TELEMETRY = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}

Process = tuple[list[str], Mapping[str, str]]
"""A command and its environment."""


@dataclass(frozen=True)
class ServerFiles:
    """Flower's folder of a server, its host:port, and its folder of keys; None: no TLS, any site may connect."""

    home: Path
    keys: Path | None
    address: str


def flower(command: str) -> str:
    """Find one of Flower's commands beside this Python.

    Raises:
        InputError: Flower is not installed.
    """
    found = shutil.which(command, path=_path())
    if found is None:
        raise InputError(
            "deployment needs Flower, which is not installed",
            cause="It is an extra of ParaBlock.",
            remedy='Install it: pip install "parablock[flower]"',
        )
    return found


def make_flower_keys(folder: Path, num_sites: int, hosts: Sequence[str]) -> None:
    """Make an authority, the server's certificate for its hosts, and for each site the key pair of its SuperNode.

    Raises:
        StorageError: The folder holds something, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from parablock.deploy.authority import make_all
    from parablock.deploy.signing_request import write_new

    make_all(folder, 0, hosts)
    authority, ssh = (folder / "server" / "authority.pem").read_bytes(), serialization.PublicFormat.OpenSSH
    for site in (f"site-{number}" for number in range(num_sites)):
        pair = ec.generate_private_key(ec.SECP384R1())
        form = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        private = pair.private_bytes(serialization.Encoding.PEM, *form)
        public = pair.public_key().public_bytes(serialization.Encoding.OpenSSH, ssh)
        write_new(folder / site / "node.key", private, mode=0o600)
        write_new(folder / site / "authority.pem", authority, mode=0o644)
        write_new(folder / "server" / f"{site}.pub", public, mode=0o644)


def run_command(app: Path, more: Mapping[str, str]) -> str:
    """Return the line by which a user starts a run, to go on with the name of a connection or with options."""
    variables = (f"{name}={value}" for name, value in {**NO_TELEMETRY, **more}.items())
    return " ".join([*variables, "flwr", "run", as_argument(app)])


def superlink_command(files: ServerFiles) -> list[str]:
    """Return the command of the server."""
    host, _, port = files.address.rpartition(":")
    command = [flower("flower-superlink"), "--host", host, "--port", port, *_apart(files.home)]
    command += ["--database", str(files.home / "superlink.db"), "--disable-runtime-dependency-installation"]
    if files.keys is None:
        return [*command, "--insecure"]
    return [
        *command,
        *("--ssl-certfile", str(files.keys / "server.pem")),
        *("--ssl-keyfile", str(files.keys / "server.key")),
        *("--ssl-ca-certfile", str(files.keys / "authority.pem")),
        "--enable-supernode-auth",
    ]


def supernode_command(superlink: str, keys: Path | None, site_file: Path, port: int, home: Path) -> list[str]:
    """Return the command of a site's SuperNode, with a port of its own on this machine.

    `keys` is the site's folder of `make_flower_keys`; without it there is no TLS.
    """
    command = [flower("flower-supernode"), "--superlink", superlink, "--port", str(port), *_apart(home)]
    host = superlink.rpartition(":")[0].strip("[]")
    command += ["--node-config", f"site={json.dumps(str(site_file))} server-host={json.dumps(host)}"]
    if keys is None:
        return [*command, "--insecure"]
    return [
        *command,
        *("--root-certificates", str(keys / "authority.pem")),
        *("--auth-supernode-private-key", str(keys / "node.key")),
    ]


def helper_command(address: str, home: Path, authority: Path | None = None) -> list[str]:
    """Return the command of the helper beside a SuperLink or SuperNode, which starts its apps."""
    command = [flower("flower-superexec"), "--runtime-api-address", address]
    command += ["--superexec-auth-secret-file", str(_secret(home))]
    return [*command, *(["--insecure"] if authority is None else ["--root-certificates", str(authority)])]


def _apart(home: Path) -> list[str]:
    return ["--isolation", "process", "--superexec-auth-secret-file", str(_secret(home))]


def _secret(home: Path) -> Path:
    """Return the file of the secret between a helper and its process, made at the first time."""
    path = home / "superexec.secret"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
    return path


def site_processes(home: Path, superlink: str, keys: Path | None, site_file: Path, port: int) -> dict[str, Process]:
    """Return the processes of a site: its SuperNode, and the helper; see `supernode_command`."""
    env = environment(home)
    return {
        "supernode": (supernode_command(superlink, keys, site_file, port, home), env),
        "helper": (helper_command(f"127.0.0.1:{port}", home), env),
    }


def server_processes(files: ServerFiles, reached: str, more: Mapping[str, str]) -> dict[str, Process]:
    """Return the processes of a server that is reached at an address: its SuperLink, and the helper."""
    env = environment(files.home, more)
    authority = files.keys and files.keys / "authority.pem"
    return {
        "superlink": (superlink_command(files), env),
        "helper": (helper_command(reached, files.home, authority), env),
    }


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of Flower's processes: quiet, with a home of their own, and our Python first."""
    home.mkdir(parents=True, exist_ok=True)
    return {**os.environ, **NO_TELEMETRY, "FLWR_HOME": str(home), "PATH": _path(), **(more or {})}


def write_app(directory: Path, output_dir: Path | str = "", nodes: str = "") -> Path:
    """Write the Flower app for plain `flwr run`; it holds only names, all code is in the installed package.

    It names the run directory, for a SuperLink whose environment does not, and which node each client is; empty:
    the first that comes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pyproject.toml").write_text(
        f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "parablock-app"
version = "{__version__}"
description = "Federated fine-tuning with ParaBlock"
license = {{text = "Apache-2.0"}}
dependencies = ["parablock[flower]=={__version__}"]

[tool.flwr.app]
publisher = "parablock"

[tool.flwr.app.components]
serverapp = "parablock.deploy.server_app:app"
clientapp = "parablock.deploy.client_app:app"

[tool.flwr.app.config]
{OUTPUT_KEY} = {json.dumps(str(output_dir))}
{DATA_PORT_KEY} = 0
{NODES_KEY} = {json.dumps(nodes)}
""",
        encoding="utf-8",
    )
    return directory


def write_connection(files: ServerFiles) -> None:
    """Write the address of the server for `flwr`."""
    files.home.mkdir(parents=True, exist_ok=True)
    safety = "insecure = true" if files.keys is None else f'root-certificates = "{files.keys / "authority.pem"}"'
    lines = ["[superlink]", f'default = "{CONNECTION}"', "", f"[superlink.{CONNECTION}]"]
    lines += [f'address = "{files.address}"', safety, ""]
    (files.home / "config.toml").write_text("\n".join(lines), encoding="utf-8")


def register_sites(files: ServerFiles) -> str:
    """Let every site connect whose public key is in the server's folder; return the node that each of them is.

    The SuperLink's database keeps them, and our folder beside it what it said.
    """
    assert files.keys is not None
    known_file = files.home / "nodes.json"
    known = json.loads(known_file.read_text(encoding="utf-8")) if known_file.exists() else {}
    for public in sorted(files.keys.glob("site-*.pub")):
        if public.stem not in known:
            answer = _flwr(files, ["supernode", "register", str(public), CONNECTION, "--format", "json"])
            known[public.stem] = str(json.loads(answer[answer.index("{") :])["node-id"])
            known_file.write_text(json.dumps(known), encoding="utf-8")
    return " ".join(f"{name.removeprefix('site-')}={node}" for name, node in known.items())


def submit(files: ServerFiles, app: Path) -> str:
    """Start a run; return its id."""
    answer = _flwr(files, ["run", str(app), CONNECTION, "--format", "json"])
    run_id = json.loads(answer[answer.index("{") :]).get("run-id")
    if run_id is None:
        raise ParaBlockError(f"`flwr run` started nothing: {answer.strip()[-800:]}")
    return str(run_id)


def run_status(files: ServerFiles, run_id: str) -> str:
    """Return how a run stands, in Flower's words; `unknown` where it does not answer."""
    answer = _flwr(files, ["list", "--run-id", run_id, CONNECTION, "--format", "json"])
    runs = json.loads(answer[answer.index("{") :]).get("runs", [{"status": "unknown"}])
    return str(runs[0]["status"])


def wait_for_port(address: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 60.0) -> None:
    """Wait until something listens there.

    Raises:
        ParaBlockError: The process ended, or does not listen in time.
    """
    host, _, port = address.rpartition(":")
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.1)
    raise ParaBlockError(
        f"the SuperLink does not listen at {address}:",
        lines=last_lines(log, 8),
        cause="The port is busy, or its certificate cannot be read.",
        remedy=f"Look at {log}, or choose another port.",
    )


def free_ports(count: int) -> list[int]:
    """Find ports of this machine that nobody listens at."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _flwr(files: ServerFiles, arguments: Sequence[str]) -> str:
    command = [flower("flwr"), *arguments]
    done = subprocess.run(command, env=environment(files.home), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(
            f"`flwr {' '.join(arguments)}` failed:",
            lines=(done.stdout + done.stderr).strip()[-800:].splitlines(),
            cause="Flower's server at " + files.address + " refused it or cannot be reached.",
        )
    return done.stdout


def _path() -> str:
    return os.pathsep.join([str(PYTHON.parent), os.environ.get("PATH", "")])
