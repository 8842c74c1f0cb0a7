"""`parablock deploy`: the server and the sites of a real deployment."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parablock.cli.deploy_keys import keys_app
from parablock.cli.deploy_start import check, init_app
from parablock.cli.output import say, say_whole
from parablock.cli.terminal import (
    LOADING,
    SAME_COMMAND,
    Overrides,
    console,
    print_summary,
    show_progress,
    show_work,
)
from parablock.deploy.allocation import keep_memory, libraries_load
from parablock.errors import ConfigError, InputError

if TYPE_CHECKING:
    from parablock.config.keys import RunConfig

deploy = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run over real sites.")
deploy.add_typer(keys_app, name="keys")
deploy.add_typer(init_app, name="init")
deploy.command()(check)

Insecure = Annotated[
    bool, typer.Option("--insecure", help="Use neither TLS nor node keys; for trials on one machine.")
]
RunFile = Annotated[Path, typer.Argument(help="A YAML file, as for `parablock run`.")]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="A folder for the results.")]
Clients = Annotated[int | None, typer.Option("--clients", min=1, help="Sites; default: as configured.")]
Keys = Annotated[Path | None, typer.Option("--keys", help="The folder with the key and the certificate.")]
RunDir = Annotated[Path, typer.Argument(help="The run directory of the server.")]


@deploy.command()
def server(
    config: Annotated[Path, typer.Argument(help="The run, as YAML.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="The run directory; a run in it goes on.")],
    keys: Keys = None,
    address: Annotated[str, typer.Option("--address", help="host:port to listen at.")] = "0.0.0.0:8000",
    sites: Annotated[
        int | None, typer.Option("--sites", min=1, help="Begin once so many are there; default: all clients.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Serve metrics for Prometheus at this port of 127.0.0.1.")
    ] = None,
    overrides: Overrides = None,
    *,
    insecure: Insecure = False,
) -> None:
    """Run with the sites that connect, and end with the run. Ctrl-C saves it; the same command goes on with it.

    Example: parablock deploy server run.yaml --keys keys/server --output-dir runs/first
    """
    keep_memory()
    with libraries_load(), show_work() as work:
        work.stage(LOADING, is_brief=True)
        from parablock.config.load import load_server_config
        from parablock.deploy.direct_server import serve_run
        from parablock.deploy.door import check_keys

        check_keys(keys, insecure=insecure)
        settings = load_server_config(config, overrides or [])
        if metrics_port is not None:
            from parablock.deploy.metrics_endpoint import serve_metrics

            serve_metrics(output_dir, metrics_port)
    with show_progress(output_dir, SAME_COMMAND) as (progress, stop):
        summary = serve_run(
            settings,
            output_dir,
            keys=keys,
            address=address if keys else address.replace("0.0.0.0", "127.0.0.1"),
            num_sites=sites,
            progress=progress,
            asked_to_stop=stop,
        )
    print_summary(summary, output_dir, SAME_COMMAND)


@deploy.command()
def client(
    site: Annotated[Path, typer.Argument(help="The site's own YAML file.")],
    server: Annotated[str, typer.Option("--server", help="host:port of the server.")],
    keys: Keys = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="End with the first run; for a batch system.")] = False,
    insecure: Insecure = False,
) -> None:
    """Serve the runs of a server, one after another. Ctrl-C leaves the run and ends the process.

    Example: parablock deploy client site.yaml --server fl.example.org:8000 --keys keys
    """
    keep_memory()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read at import; a server that ends is no news here
    with libraries_load(), show_work() as work:
        work.stage(LOADING, is_brief=True)
        from parablock.deploy.door import check_keys
        from parablock.deploy.site import load_site
        from parablock.deploy.site_service import start_site

        check_keys(keys, insecure=insecure)
        loaded = load_site(site)
    start_site(loaded, server, keys, once=once)


@deploy.command()
def local(
    config: RunFile,
    output_dir: OutputDir,
    clients: Clients = None,
    overrides: Overrides = None,
    engine: Annotated[
        str, typer.Option("--engine", help="remote: direct; flower: SuperLink, SuperNodes.")
    ] = "remote",
    *,
    insecure: Insecure = False,
) -> None:
    """Start a server and sites on this machine, run, and stop all of them again.

    Example: parablock deploy local configs/t0.yaml --output-dir runs/deployed
    """
    if engine not in ("remote", "flower"):
        raise ConfigError([f"--engine is remote or flower, not {engine}"], source="deploy local")
    settings = _run_at_sites(config, overrides, clients, engine)
    with show_progress(output_dir) as (progress, stop):
        if engine == "remote":
            from parablock.deploy.direct_local import deploy_direct

            summary = deploy_direct(settings, output_dir, insecure=insecure, progress=progress, asked_to_stop=stop)
        else:
            from parablock.deploy.one_machine import deploy_local

            summary = deploy_local(settings, output_dir, insecure=insecure, progress=progress, asked_to_stop=stop)
    print_summary(summary, output_dir)


@deploy.command()
def status(
    output_dir: RunDir,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Show it every second, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show who is connected, since when, how much has moved, and what is waited for.

    Example: parablock deploy status runs/first --watch
    """
    from rich.live import Live

    from parablock.deploy import status as board

    now = board.read_status(output_dir)
    if as_json:
        say_whole(json.dumps(now, indent=1))
    elif not watch:
        console.print(board.status_table(now))
    else:
        with suppress(KeyboardInterrupt), Live(board.status_table(now), console=console) as live:
            for now in board.watch(output_dir):
                live.update(board.status_table(now))


@deploy.command()
def stop(output_dir: RunDir) -> None:
    """Ask the server to save and stop at the next round; sites stay, and go on when it is started again.

    Example: parablock deploy stop runs/first
    """
    _ask(output_dir, "stop", "The server saves and stops at the next round.")


@deploy.command()
def pause(output_dir: RunDir, *, off: Annotated[bool, typer.Option("--off", help="Go on.")] = False) -> None:
    """Let the server begin no further round, until `--off`.

    Example: parablock deploy pause runs/first
    """
    _ask(output_dir, "pause", "The server goes on." if off else "The server begins no further round.", undo=off)


@deploy.command()
def remove(
    output_dir: RunDir,
    client: Annotated[str, typer.Argument(help="Its number, or site-N as in its certificate.")],
    *,
    undo: Annotated[bool, typer.Option("--undo", help="Let it join again.")] = False,
) -> None:
    """Remove a site from the run: what it sends from now on does not count, and it is not let in.

    Example: parablock deploy remove runs/first 3
    """
    number = client.removeprefix("site-")
    if not (number.isascii() and number.isdecimal()):
        raise ConfigError(
            [f"{client!r} is no client; give its number, such as 3 or site-3"], source="deploy remove"
        )
    client_id = int(number)
    words = f"Client {client_id} may join again." if undo else f"Client {client_id} is removed."
    _check_client(output_dir, client_id)
    _ask(output_dir, f"removed-{client_id}", words, undo=undo)


def _check_client(output_dir: Path, client_id: int) -> None:
    from parablock.deploy.status import read_status

    there = [site["client_id"] for site in read_status(output_dir)["sites"]]
    if client_id not in there:
        problem = f"there is no client {client_id} in this run; its clients are 0 to {max(there)}"
        raise ConfigError([problem], source="the command line")


def _ask(output_dir: Path, what: str, words: str, *, undo: bool = False) -> None:
    from parablock.deploy.status import control_of, read_status

    now = read_status(output_dir)
    if now["completed"]:
        raise InputError(
            f"the run in {output_dir} is complete: its server has ended", remedy="Ask the server of another run."
        )
    if not now["running"]:
        say("No server is running there at present; it is told when it starts.", err=True)
    control_of(output_dir).ask(what, undo=undo)
    say(words)


@deploy.command()
def app(
    config: RunFile,
    output_dir: OutputDir,
    clients: Clients = None,
    overrides: Overrides = None,
) -> None:
    """Write a run as a Flower app, for `flwr run` in a federation whose SuperLink is on this machine.

    Example: parablock deploy app configs/t0.yaml --clients 2 --output-dir runs/federated
    """
    with show_work() as work:
        work.stage(LOADING, is_brief=True)
        from parablock.config.load import load_server_config
        from parablock.deploy.one_machine import prepare_app
        from parablock.deploy.processes import run_command

        more = [] if clients is None else [f"federation.num_clients={clients}"]
        settings = load_server_config(config, [*(overrides or []), *more], engine="flower")
    folder, num_sites = prepare_app(settings, output_dir)
    say(f"For a federation of {num_sites} sites, with the name of its connection behind it:")
    say_whole(run_command(folder, {}))


def _run_at_sites(config: Path, overrides: list[str] | None, clients: int | None, engine: str) -> RunConfig:
    """Load a run for an engine of real sites; `clients` replaces the configured number of clients."""
    with show_work() as work:
        work.stage(LOADING, is_brief=True)
        from parablock.config.load import at_sites, load_config

        more = [] if clients is None else [f"federation.num_clients={clients}"]
        return load_config(config, [*(overrides or []), *more, *at_sites(engine)])
