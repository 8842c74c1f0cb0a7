"""`parablock deploy`: the server and the sites of a real deployment, on Flower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parablock.cli.terminal import Overrides, print_summary, show_progress
from parablock.errors import ConfigError

if TYPE_CHECKING:
    from parablock.config.keys import RunConfig

deploy = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run over real sites, with Flower.")

Insecure = Annotated[
    bool, typer.Option("--insecure", help="Use neither TLS nor node keys; for trials on one machine.")
]
RunFile = Annotated[Path, typer.Argument(help="A YAML file, as for `parablock run`.")]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="A folder for the results.")]
Clients = Annotated[int | None, typer.Option("--clients", min=1, help="Sites; default: as configured.")]


@deploy.command()
def keys(
    sites: Annotated[int, typer.Option("--sites", min=1, help="Number of sites.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="A new folder.")],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="A name or address of the server; repeatable.")
    ] = None,
) -> None:
    """Make the server's certificate and a key pair for each site.

    Example: parablock deploy keys --sites 3 --host fl.example.org --output-dir keys
    """
    from parablock.deploy.credentials import make_keys

    hosts = host or ["localhost", "127.0.0.1"]
    make_keys(output_dir, sites, hosts)
    typer.echo(f"{output_dir}/server stays on the server; its certificate is for {', '.join(hosts)}.")
    typer.echo(
        f"{output_dir}/site-0 … site-{sites - 1}: hand each to its site alone, over a channel that you trust."
    )


@deploy.command()
def server(
    config: Annotated[Path, typer.Argument(help="The run, as YAML.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="The run directory.")],
    keys: Annotated[Path | None, typer.Option("--keys", help="DIR/server of `deploy keys`.")] = None,
    address: Annotated[str, typer.Option("--address", help="host:port to listen at.")] = "0.0.0.0:8000",
    *,
    insecure: Insecure = False,
) -> None:
    """Start the server: Flower's SuperLink, with this run ready to be submitted. Ctrl-C ends it.

    Example: parablock deploy server run.yaml --keys keys/server --output-dir runs/first
    """
    from parablock.deploy.superlink import serve, server_config

    if (keys is None) != insecure:
        raise ConfigError(["give --keys DIR, or --insecure, and not both"], source="deploy server")
    serve(server_config(config), output_dir, keys=keys, address=address)


@deploy.command()
def client(
    site: Annotated[Path, typer.Argument(help="The site's own YAML file.")],
    superlink: Annotated[str, typer.Option("--superlink", help="host:port of the server.")],
    keys: Annotated[Path | None, typer.Option("--keys", help="This site's folder of `deploy keys`.")] = None,
    port: Annotated[int, typer.Option("--port", help="A free port of this machine, for its own processes.")] = 9094,
    *,
    insecure: Insecure = False,
) -> None:
    """Start a site: Flower's SuperNode, which connects to the server. Ctrl-C ends it.

    Example: parablock deploy client site.yaml --superlink fl.example.org:8000 --keys site-0
    """
    from parablock.deploy.processes import check_site_keys, keep_running, site_processes
    from parablock.deploy.site import load_site

    if (keys is None) != insecure:
        raise ConfigError(["give --keys DIR, or --insecure, and not both"], source="deploy client")
    if keys is not None:
        check_site_keys(keys)
    home = load_site(site).state_dir / "flower"
    processes = site_processes(home, superlink, keys and keys.absolute(), site.absolute(), port)
    keep_running(list(processes.values()), tell=typer.echo)


@deploy.command()
def local(
    config: RunFile,
    output_dir: OutputDir,
    clients: Clients = None,
    overrides: Overrides = None,
    *,
    insecure: Insecure = False,
) -> None:
    """Start a SuperLink, SuperNodes and trainers on this machine, run, and stop all of them again.

    Example: parablock deploy local configs/t0.yaml --clients 2 --output-dir runs/deployed
    """
    from parablock.deploy.one_machine import deploy_local

    settings = _flower_run(config, overrides, clients)
    with show_progress() as (progress, stop):
        summary = deploy_local(settings, output_dir, insecure=insecure, progress=progress, asked_to_stop=stop)
    print_summary(summary, output_dir)


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
    from parablock.deploy.one_machine import prepare_app
    from parablock.deploy.processes import run_command

    folder, num_sites = prepare_app(_flower_run(config, overrides, clients), output_dir)
    typer.echo(f"For a federation of {num_sites} sites, with the name of its connection behind it:")
    typer.echo(run_command(folder, {}))


def _flower_run(config: Path, overrides: list[str] | None, clients: int | None) -> RunConfig:
    """Load a run for the Flower engine; `clients` replaces the configured number of clients."""
    from parablock.config.load import load_config

    more = [] if clients is None else [f"federation.num_clients={clients}"]
    return load_config(config, [*(overrides or []), *more, "engine.name=flower"])
