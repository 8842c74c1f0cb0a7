"""`parablock deploy init` and `check`: what an operator does before the first run."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parablock.cli.output import say
from parablock.cli.terminal import LOADING, show_work

if TYPE_CHECKING:
    from parablock.deploy.site_check import Checked

init_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Write the files that an operator starts with."
)

Folder = Annotated[Path, typer.Argument(help="A folder for them.")]
Model = Annotated[str, typer.Option("--model", help="The base model: a folder, or an id of Hugging Face.")]


@init_app.command("server")
def init_server(
    directory: Folder = Path("server"),
    model: Model = "models/base",
    test: Annotated[
        list[str] | None, typer.Option("--test", help="Rows to score the model on; repeatable.")
    ] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, help="How many sites there are.")] = 2,
) -> None:
    """Write run.yaml with comments, a systemd unit and a compose file.

    Example: parablock deploy init server server --model models/base --test test.jsonl --clients 2
    """
    from parablock.deploy.starter_files import server_files

    test = test or ["test.jsonl"]
    _write(directory, server_files(directory, model=model, test=test, clients=clients), [model, *test])


@init_app.command("site")
def init_site(
    directory: Folder = Path("site"),
    client_id: Annotated[int, typer.Option("--client-id", min=0, help="Which client it is, from 0.")] = 0,
    model: Model = "models/base",
    train: Annotated[list[str] | None, typer.Option("--train", help="Its rows; repeatable.")] = None,
    server: Annotated[str, typer.Option("--server", help="host:port of the server.")] = "fl.example.org:8000",
) -> None:
    """Write site.yaml with comments, a systemd unit and a compose file.

    Example: parablock deploy init site site-0 --client-id 0 --model models/base --train notes.jsonl
    """
    from parablock.deploy.door import host_and_port
    from parablock.deploy.starter_files import site_files

    host_and_port(server)
    train = train or ["train.jsonl"]
    files = site_files(directory, client_id=client_id, model=model, train=train, server=server)
    _write(directory, files, [model, *train])


def check(
    site: Annotated[Path, typer.Argument(help="The site's own YAML file.")],
    server: Annotated[str, typer.Option("--server", help="host:port of the server.")],
    keys: Annotated[
        Path | None, typer.Option("--keys", help="The folder with the key and the certificate.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="A server's run.yaml to hold against the policy; default: its present run."),
    ] = None,
    *,
    insecure: Annotated[bool, typer.Option("--insecure", help="As for `parablock deploy client`.")] = False,
) -> None:
    """Look at everything a run would need of this site, before it joins. Exit code 2: something is wrong.

    Example: parablock deploy check site.yaml --server fl.example.org:8000 --keys keys
    """
    is_good = True
    for one in _found(site, server, keys, run, insecure=insecure):
        is_good = is_good and one.is_good
        say(f"{'✓' if one.is_good else '✗'} {one.found}")
        if one.remedy:
            say(f"  {one.remedy}")
    if not is_good:
        raise typer.Exit(2)


def _found(site: Path, server: str, keys: Path | None, run: Path | None, *, insecure: bool) -> Iterator[Checked]:
    """Yield what is found, as it is found."""
    with show_work() as work:
        work.stage(LOADING, is_brief=True)
        from parablock.deploy.door import check_keys
        from parablock.deploy.site_check import check_site
        from parablock.experiment import inputs  # noqa: F401  the look at its rows and model needs Transformers

        check_keys(keys, insecure=insecure)
    yield from check_site(site, server, keys, run)


def _write(directory: Path, files: dict[str, str], sources: Sequence[str]) -> None:
    from parablock.deploy.starter_files import write_starter_files

    write_starter_files(directory, files)
    say(f"{directory} has {', '.join(files)}. Read the first, and change what has to be changed.")
    for source in sources:
        if not glob.glob(str(Path(source).expanduser()), recursive=True):  # noqa: PTH207  # as rows are read
            told = f"{source} is not on this machine: put right the path in {next(iter(files))}"
            say(f"{told}, unless it is an id of Hugging Face, or will be there later.", err=True)
