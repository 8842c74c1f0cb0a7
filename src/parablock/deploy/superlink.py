"""The server of a real deployment: a SuperLink that knows the run, and the app that starts it."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import typer

from parablock.config.keys import RunConfig
from parablock.config.load import overridden, parse_config, read_tree
from parablock.deploy.processes import (
    CONNECTION,
    ServerFiles,
    register_sites,
    run_command,
    server_processes,
    wait_for_port,
    write_app,
    write_connection,
)
from parablock.deploy.variables import OUTPUT_VARIABLE, config_file
from parablock.storage.run_directory import RunDirectory


def server_config(path: Path) -> RunConfig:
    """Read the server's configuration, in which `data.train` may be left out: the sites bring their rows.

    Raises:
        ConfigError: With every problem.
    """
    tree = read_tree(path)
    if isinstance(tree.get("data"), dict):
        tree["data"].setdefault("train", [])
    return parse_config(overridden(tree, ["engine.name=flower"]), source=str(path))


def serve(config: RunConfig, output_dir: Path, *, keys: Path | None, address: str) -> None:
    """Start the SuperLink, let the sites in, and stay until it ends or the user does.

    A run that is in `output_dir` already goes on. Without keys there is no TLS, and any site may connect.

    Raises:
        ParaBlockError: The SuperLink does not start.
    """
    output_dir = output_dir.absolute()
    if RunDirectory(output_dir).config.exists():
        RunDirectory(output_dir).check_resumable()
    folder = output_dir / "deployment"
    folder.mkdir(parents=True, exist_ok=True)
    config_file(output_dir).write_text(config.to_yaml(), encoding="utf-8")
    local = address.replace("0.0.0.0", "127.0.0.1")
    files = ServerFiles(folder / "flower", keys and keys.absolute(), address)
    reached = ServerFiles(files.home, files.keys, local)
    write_connection(reached)
    log = folder / "superlink.log"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as service managers stop it: like Ctrl-C
    started: list[subprocess.Popen[bytes]] = []
    try:
        with log.open("ab") as output:
            commands = server_processes(files, local, {OUTPUT_VARIABLE: str(output_dir)})
            for command, env in commands.values():
                started.append(subprocess.Popen(command, env=env, stdout=output, stderr=output))
        wait_for_port(local, started[0], log)
        app = write_app(folder / "app", nodes="" if files.keys is None else register_sites(reached))
        typer.echo(f"The SuperLink listens at {address}; its log is {log}.")
        line = run_command(app, {"FLWR_HOME": str(files.home)})
        typer.echo(f"Start the run when you like: {line} {CONNECTION}")
        started[0].wait()
    except KeyboardInterrupt:
        pass
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait()
