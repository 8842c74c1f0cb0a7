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


def config_file(output_dir: Path) -> Path:
    """Return the path of the server's configuration, as the deployment was prepared with it."""
    return output_dir / "deployment" / "config.yaml"


def lanes_file(output_dir: Path) -> Path:
    """Return the file that says how many SuperNodes each site on this machine has."""
    return output_dir / "deployment" / "lanes"


def server_log(output_dir: Path) -> Path:
    """Return the log of the server: what it does and waits for."""
    return output_dir / "deployment" / "server.log"


def site_file_of(output_dir: Path, client_id: object) -> Path:
    """Return the file of a site that is on this machine."""
    return output_dir / "deployment" / "sites" / f"{client_id}.yaml"


def failure_file(output_dir: Path) -> Path:
    """Return the file in which a run that cannot go on says why, beside its run directory."""
    return output_dir.with_name(f"{output_dir.name}.failure.json")


def stop_file(output_dir: Path) -> Path:
    """Return the file that asks a run to save and stop at the next round."""
    return output_dir / "stop"
