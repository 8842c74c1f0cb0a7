"""Paths of a deployment, and how the ServerApp learns its run directory. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parablock.errors import ConfigError

OUTPUT_VARIABLE = "PARABLOCK_OUTPUT_DIR"
"""The environment variable of the SuperLink that names the run directory."""

OUTPUT_KEY = "output-dir"
"""The key of the Flower app's configuration that names it where the environment does not."""

DATA_PORT_KEY = "data-port"
"""The key that says at which port the server awaits the sites' streams; 0: any free one."""

NODES_KEY = "nodes"
"""The key that binds clients to nodes, as `0=1234 1=5678`; empty: the first node that comes as a client is it."""


def output_dir_of(environment: Mapping[str, str], run_config: Mapping[str, Any]) -> Path:
    """Find the run directory.

    Raises:
        ConfigError: Nobody names one.
    """
    named = environment.get(OUTPUT_VARIABLE) or run_config.get(OUTPUT_KEY)
    if not named:
        problem = (
            "the app does not say which run it is; start the SuperLink with `parablock deploy server`, "
            "or make the app with `parablock deploy app`"
        )
        raise ConfigError([problem], source="the Flower app")
    return Path(str(named)).absolute()


def data_port_of(run_config: Mapping[str, Any]) -> int:
    """Read the port of the sites' streams.

    Raises:
        ConfigError: It is no port.
    """
    port = run_config.get(DATA_PORT_KEY, 0)
    if not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise ConfigError([f"{DATA_PORT_KEY}: {port!r} is no port, from 0 to 65535"], source="the Flower app")
    return port


def client_of_node(run_config: Mapping[str, Any]) -> dict[int, int]:
    """Read which client each node is, by the node's id; empty: nobody says.

    Raises:
        ConfigError: It cannot be read, or a client or node stands twice.
    """
    pairs = [word.partition("=") for word in str(run_config.get(NODES_KEY, "")).replace(",", " ").split()]
    clients, nodes = {client for client, _, _ in pairs}, {node for _, _, node in pairs}
    if not all(word.isdecimal() for word in clients | nodes) or not len(clients) == len(nodes) == len(pairs):
        problem = (
            f"{NODES_KEY}: {run_config[NODES_KEY]!r} does not read CLIENT=NODE for each client, as 0=1234 1=5678"
        )
        raise ConfigError([problem], source="the Flower app")
    return {int(node): int(client) for client, _, node in pairs}


def config_file(output_dir: Path) -> Path:
    """Return the path of the server's configuration, as the deployment was prepared with it."""
    return output_dir / "deployment" / "config.yaml"


def server_log(output_dir: Path) -> Path:
    """Return the log of the server: what it does and waits for."""
    return output_dir / "deployment" / "server.log"


def site_file_of(output_dir: Path, client_id: object) -> Path:
    """Return the file of a site that is on this machine."""
    return output_dir / "deployment" / "sites" / f"{client_id}.yaml"


def failure_file(output_dir: Path) -> Path:
    """Return the file in which a run that cannot go on says why, beside its run directory."""
    return output_dir.with_name(f"{output_dir.name}.failure.json")
