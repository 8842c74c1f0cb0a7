"""`parablock deploy keys`: who may be the server and who a site, from the first key to the last revocation."""

from __future__ import annotations

import sys
from getpass import GetPassWarning
from pathlib import Path
from typing import Annotated
from warnings import catch_warnings

import typer

from parablock.cli.output import say, say_whole
from parablock.errors import ConfigError

keys_app = typer.Typer(
    rich_markup_mode=None,
    help="Keys and certificates: an end makes its key and a request, the authority signs it, the end installs it.",
)

Authority = Annotated[Path, typer.Option("--authority", help="The folder of the authority.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="A file for you alone; default: asked for at the terminal."),
]


@keys_app.callback(invoke_without_command=True)
def everything(
    context: typer.Context,
    sites: Annotated[
        int | None, typer.Option("--sites", min=1, help="All keys at once, for so many sites.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="A new folder for all of them.")] = None,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="A name or address of the server; repeatable.")
    ] = None,
) -> None:
    """Keys and certificates: an end makes its key and a request, the authority signs it, the end installs it.

    For a trial, all of them at once, where one person sees every key:

    Example: parablock deploy keys --sites 2 --output-dir keys
    """
    if context.invoked_subcommand is not None:
        return
    if sites is None or output_dir is None:
        say_whole(context.get_help())
        raise typer.Exit(2)
    from parablock.deploy.authority import make_all

    make_all(output_dir, sites, host or [])
    say(
        f"{output_dir}/server is the server's; {output_dir}/site-0 to site-{sites - 1} are one site's each.",
        f"{output_dir}/authority has a key without a passphrase, which lets anybody in: for a trial only.",
    )


@keys_app.command()
def authority(
    directory: Annotated[Path, typer.Argument(help="A new folder, best on a machine that is in no run.")],
    passphrase_file: PassphraseFile = None,
    *,
    unencrypted: Annotated[
        bool, typer.Option("--unencrypted", help="Keep the key without a passphrase; for trials.")
    ] = False,
) -> None:
    """Make the authority that says who the server is and who the sites are. Once for a federation.

    Example: parablock deploy keys authority authority
    """
    from parablock.deploy.authority import make_authority

    if unencrypted and passphrase_file:
        raise ConfigError(
            ["give --passphrase-file FILE or --unencrypted, not both"], source="deploy keys authority"
        )
    make_authority(directory, passphrase=None if unencrypted else _passphrase(passphrase_file, new=True))
    say(f"{directory} holds the authority. Whoever has its authority.key can let anybody in: keep a backup.")


@keys_app.command()
def request(
    directory: Annotated[Path, typer.Argument(help="The folder of this site, or of the server.")],
    name: Annotated[str, typer.Option("--name", help="server, or site-N for client N.")],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="A name or address of the server; repeatable.")
    ] = None,
) -> None:
    """Make a private key, which stays here, and a request for the authority. At a renewal the key is kept.

    Example: parablock deploy keys request keys --name site-3

    Example: parablock deploy keys request keys --name server --host fl.example.org
    """
    from parablock.deploy.authority import make_request

    made = make_request(directory, name, host or [])
    _tell_request(made)
    if name == "server" and not host:
        say("No other machine can use it: for that, give --host with the name by which sites call the server.")
    say(f"Send {made} to the authority, and compare the key with it by another way, such as by telephone.")


@keys_app.command()
def renew(
    directory: Annotated[Path, typer.Argument(help="The folder of this site, or of the server.")],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Of the server: other names than it has; repeatable.")
    ] = None,
) -> None:
    """Make a request for the name that the folder's certificate has, with the same key.

    Example: parablock deploy keys renew keys
    """
    from parablock.deploy.authority import make_renewal

    made = make_renewal(directory, host or [])
    _tell_request(made)
    say(f"Send {made} to the authority, and install its answer; processes that run take it by themselves.")


@keys_app.command()
def sign(
    requested: Annotated[Path, typer.Argument(metavar="REQUEST", help="The file that the end sent.")],
    authority_dir: Authority,
    days: Annotated[int, typer.Option("--days", min=1, help="How long the certificate is valid.")] = 365,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="For both files of the answer; default: beside the request.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="Accept another key for this name, and revoke what it had.")
    ] = False,
) -> None:
    """Sign a request, after you have compared its key with the one who sent it.

    Example: parablock deploy keys sign site.csr --authority authority --output-dir answer
    """
    from parablock.deploy.authority import sign_request

    _tell_request(requested)
    passphrase = _passphrase_of(authority_dir, passphrase_file)
    signed = sign_request(
        requested, authority_dir, passphrase=passphrase, days=days, replace=replace, output_dir=output_dir
    )
    say(f"Send back {signed} and {signed.with_name('authority.pem')}; neither is secret.")
    if replace:
        say(f"Copy {authority_dir / 'revoked.pem'} to the server, which may list an older certificate now.")


@keys_app.command()
def install(
    directory: Annotated[Path, typer.Argument(help="The folder in which the request was made.")],
    certificate: Annotated[Path, typer.Argument(help="What the authority signed; authority.pem lies beside it.")],
) -> None:
    """Put the answer of the authority in its place, if it fits the key there.

    Example: parablock deploy keys install keys answer/site-3.pem
    """
    from parablock.deploy.authority import install_certificate

    installed = install_certificate(directory, certificate, certificate.with_name("authority.pem"))
    say(f"{directory}: {installed.name}, {installed.days_left} days left")


@keys_app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="server, or site-N.")],
    authority_dir: Authority,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Revoke all certificates of a name. It holds as soon as the server has the new list.

    Example: parablock deploy keys revoke site-3 --authority authority
    """
    from parablock.deploy.authority import revoke as revoke_name

    revoked = revoke_name(authority_dir, name, passphrase=_passphrase_of(authority_dir, passphrase_file))
    if not revoked:
        say(f"{name} has no valid certificate: nothing is left to revoke.")
        return
    say(f"revoked: {', '.join(f'{serial:X}' for serial in revoked)}")
    say(f"Copy {authority_dir / 'revoked.pem'} to the server, which reads it at each connection.")


@keys_app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="The folder of an authority, a server or a site.")],
) -> None:
    """Show whom a folder is for and how long; of an authority, all that it signed.

    Example: parablock deploy keys show keys
    """
    from parablock.deploy.authority import list_issued, load_credentials

    if (directory / "issued.jsonl").exists():
        for one, state in list_issued(directory):
            say(f"{one.name}  {state}  to {one.not_after:%Y-%m-%d}  serial {one.serial:X}  key {one.key}")
        return
    loaded = load_credentials(directory)
    say(f"{loaded.name}: {loaded.days_left} days left, to {loaded.not_after:%Y-%m-%d %H:%M} UTC")
    if loaded.hosts:
        say(f"hosts: {', '.join(loaded.hosts)}")


def _tell_request(path: Path) -> None:
    from parablock.deploy.authority import read_request

    read = read_request(path)
    say(f"{read.name}{' at ' if read.hosts else ''}{', '.join(read.hosts)}  key {read.fingerprint}")


def _passphrase_of(authority_dir: Path, file: Path | None) -> bytes | None:
    """Get the passphrase of an authority's key; None where the key has none and none is given."""
    from parablock.deploy.authority import key_is_encrypted

    return _passphrase(file, new=False) if file or key_is_encrypted(authority_dir) else None


def _passphrase(file: Path | None, *, new: bool) -> bytes:
    from parablock.deploy.certificates import read_private

    if file:
        return read_private(file).rstrip(b"\r\n")
    with catch_warnings(action="ignore", category=GetPassWarning):  # without a terminal nothing is shown anyway
        try:
            typed: str = typer.prompt("Passphrase of the authority", hide_input=True, confirmation_prompt=new)
        except typer.Abort:
            if sys.stdin.isatty():
                raise
            problem = (
                "the passphrase of the authority is asked at a terminal; without one give --passphrase-file FILE"
            )
            raise ConfigError([problem], source="the command line") from None
    return typed.encode()
