"""Flower's own commands with safe defaults: TLS and node keys on, telemetry and update checks off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parablock import __version__
from parablock.deploy.credentials import missing_extra
from parablock.deploy.variables import OUTPUT_KEY
from parablock.deploy.warm import write_commands
from parablock.engine.flower.exchange import BOTH, DOWN, UP
from parablock.engine.flower.pace import ONE_BY_ONE
from parablock.engine.flower.stream import PART_BYTES, together_bytes
from parablock.errors import ConfigError, InputError, ParaBlockError
from parablock.storage.files import last_lines

CONNECTION = "parablock"
"""The name of the server in the Flower configuration that we write."""
AGAIN_S = 5.0
"""How long after its end a SuperNode is started again."""
LOOK_S = 0.2
"""How often SuperNodes are looked after."""
END_S = 5.0
"""How long a SuperNode may take to end when it is told to."""
NO_TELEMETRY = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
WHOLE_ARRAYS = {"FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(together_bytes(PART_BYTES))}
"""Lets an Array be one object to Flower; each is a request of its own, signed and checked."""
POLL_OFTEN = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}
"""How often a SuperNode's helper asks it for a message, seconds; each time takes a few milliseconds of a core."""
SMALL_HEAP = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Makes the C library give the buffers of messages back when they are freed, instead of keeping them for others."""
REUSE_MEMORY = {
    **dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "33554432"),
    "MALLOC_ARENA_MAX": "1",
}
"""Makes it keep some for the next message of a site, which has one at a time: what is new has to be cleared."""
TUNABLES, LARGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
"""Makes it ask for them in large pages, where the system has those for who asks: less work for the same bytes."""
LANES = {1: (BOTH,), 2: (UP, DOWN)}
"""What each SuperNode of a site carries, by how many it has."""
KEY_FILES = {BOTH: "site.key", UP: "site.key", DOWN: "down.key"}
"""Each SuperNode's private key in the site's folder of `make_keys`."""

Process = tuple[list[str], Mapping[str, str]]
"""A command and its environment."""
SIMULATION = {"RAY_USAGE_STATS_ENABLED": "0"}
"""For Ray, which Flower's simulation starts: no report to its makers."""


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
        raise missing_extra()
    return found


def run_command(app: Path, more: Mapping[str, str]) -> str:
    """Return the line by which a user starts a run, to go on with the name of a connection or with options."""
    variables = (f"{name}={value}" for name, value in {**NO_TELEMETRY, **more}.items())
    return " ".join([*variables, "flwr", "run", str(app)])


def superlink_command(files: ServerFiles) -> list[str]:
    """Return the command of the server."""
    host, _, port = files.address.rpartition(":")
    command = [flower("flower-superlink"), "--host", host, "--port", port]
    command.append("--disable-runtime-dependency-installation")
    if files.keys is None:
        return [*command, "--insecure"]
    return [
        *command,
        *("--ssl-certfile", str(files.keys / "server.pem")),
        *("--ssl-keyfile", str(files.keys / "server.key")),
        *("--ssl-ca-certfile", str(files.keys / "ca.pem")),
        "--enable-supernode-auth",
    ]


def supernode_command(
    superlink: str, keys: Path | None, site_file: Path, port: int, carries: str = BOTH
) -> list[str]:
    """Return the command of a SuperNode of a site, with a port of its own on this machine.

    `keys` is the site's folder of `make_keys`; without it there is no TLS.
    """
    command = [flower("flower-supernode"), "--superlink", superlink, "--port", str(port)]
    command += ["--node-config", f"site={json.dumps(str(site_file))} carries={json.dumps(carries)}"]
    if keys is None:
        return [*command, "--insecure"]
    return [
        *command,
        *("--root-certificates", str(keys / "ca.pem")),
        *("--auth-supernode-private-key", str(keys / KEY_FILES[carries])),
    ]


def check_site_keys(keys: Path, lanes: int) -> None:
    """Refuse a folder that is not one of a site with so many SuperNodes.

    Raises:
        ConfigError: It lacks something.
    """
    needed = ["ca.pem", *(KEY_FILES[carries] for carries in LANES[lanes])]
    missing = [name for name in needed if not (keys / name).is_file()]
    if missing:
        raise ConfigError(
            [f"--keys: {keys} has no {' and no '.join(missing)}; give a folder site-N of `deploy keys`"],
            source="deploy client",
        )


def client_command(superlink: str, keys: Path | None, site_file: Path, port: int, lanes: int) -> list[str]:
    """Return the command of a site as its operator types it, with so many SuperNodes; see `supernode_command`."""
    command = [sys.executable, "-m", "parablock", "deploy", "client", str(site_file)]
    command += ["--superlink", superlink, "--port", str(port), "--lanes", str(lanes)]
    return [*command, "--insecure"] if keys is None else [*command, "--keys", str(keys)]


def supernodes_of(
    home: Path, superlink: str, keys: Path | None, site_file: Path, port: int, lanes: int
) -> list[Process]:
    """Return the SuperNodes of a site, each with a folder and a port of its own; see `supernode_command`."""
    found: list[Process] = []
    for carries, own_port in zip(LANES[lanes], [port, *free_ports(lanes - 1)], strict=True):
        own_home = home.with_name(f"{home.name}-{carries}") if carries == DOWN else home
        command = supernode_command(superlink, keys, site_file, own_port, carries)
        found.append((command, site_environment(own_home)))
    return found


def keep_running(commands: Sequence[Process], *, tell: Callable[[str], None]) -> None:
    """Run commands until they end well or we are told to end; start one again after a while where it fails.

    A SuperNode that lost its power is refused until the server has noticed, which takes it a minute.
    """

    def end(number: int, frame: object) -> None:
        del frame
        sys.exit(128 + number)  # out of whatever waits below; the handler itself must not wait for the process

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, env in commands:
            processes.append(subprocess.Popen(command, env=env))
        while any(process.poll() != 0 for process in processes):
            for place, (command, env) in enumerate(commands):
                if code := processes[place].poll():
                    tell(
                        f"a SuperNode ended with code {code} and starts again in {AGAIN_S:g} s. If the server "
                        "refused it, then either the server does not know this site's key: give --keys the folder "
                        "made for this site. Or it has not noticed yet that the site was gone, which takes it a "
                        "minute."
                    )
                    time.sleep(AGAIN_S)
                    processes[place] = subprocess.Popen(command, env=env)
            time.sleep(LOOK_S)
    finally:
        for process in processes:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:  # as long as it tries to reach a server, it does not listen
        process.kill()
        process.wait()


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of Flower's processes: quiet, with a home of their own, and our Python first."""
    home.mkdir(parents=True, exist_ok=True)
    pages = {TUNABLES: ":".join(filter(None, [LARGE_PAGES, os.environ.get(TUNABLES, "")]))}
    own = {"FLWR_HOME": str(home), "PATH": _path(), **(more or {})}
    return {**os.environ, **NO_TELEMETRY, **WHOLE_ARRAYS, **SMALL_HEAP, **pages, **own}


def server_environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a SuperLink."""
    return environment(home, {**ONE_BY_ONE, **(more or {})})


def site_environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a SuperNode; it finds a ClientApp that is loaded, where the system allows."""
    env, commands = environment(home, {**POLL_OFTEN, **REUSE_MEMORY, **(more or {})}), home / "bin"
    if write_commands(commands, flower("flwr-clientapp")):
        env["PATH"] = os.pathsep.join([str(commands), env["PATH"]])
    return env


def write_app(directory: Path, output_dir: Path | str = "") -> Path:
    """Write the Flower app for plain `flwr run`; it holds only names, all code is in the installed package.

    It names the run directory, for a SuperLink whose environment does not.
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
""",
        encoding="utf-8",
    )
    return directory


def write_connection(files: ServerFiles) -> None:
    """Write the address of the server for `flwr`."""
    files.home.mkdir(parents=True, exist_ok=True)
    safety = "insecure = true" if files.keys is None else f'root-certificates = "{files.keys / "ca.pem"}"'
    lines = ["[superlink]", f'default = "{CONNECTION}"', "", f"[superlink.{CONNECTION}]"]
    lines += [f'address = "{files.address}"', safety, ""]
    (files.home / "config.toml").write_text("\n".join(lines), encoding="utf-8")


def register_sites(files: ServerFiles) -> None:
    """Let every site connect whose public key is in the server's folder."""
    assert files.keys is not None
    for public in sorted(files.keys.glob("site-*.pub")):
        _flwr(files, ["supernode", "register", str(public), CONNECTION])


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
        f"the SuperLink does not listen at {address}:\n{last_lines(log, 8)}",
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
            f"`flwr {' '.join(arguments)}` failed: {(done.stdout + done.stderr).strip()[-800:]}",
            cause="Flower's server at " + files.address + " refused it or cannot be reached.",
        )
    return done.stdout


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
