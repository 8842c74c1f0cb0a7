"""The door of a direct deployment: who may enter at the server, and how a site knows the server."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import psutil

from parablock.errors import ConfigError, InputError, ParaBlockError

try:
    import grpc
except ImportError:
    raise InputError(
        "a direct deployment needs grpcio, which is not installed",
        cause="It comes with an extra of ParaBlock.",
        remedy='Install it: pip install "parablock[deploy]"',
    ) from None

# isort: split
from parablock.deploy.authority import Credentials, Revocations, load_credentials
from parablock.deploy.certificates import client_id_of
from parablock.deploy.site_identity import CertificateIdentity
from parablock.deploy.status import WARN_DAYS
from parablock.deploy.strangers import Strangers
from parablock.engine.remote.grpc_options import settle_environment
from parablock.engine.remote.listener import Caller, Listener, NotAdmitted
from parablock.engine.remote.site_channel import ServerEnd

NO_CERTIFICATE = "it has no certificate that counts, or ended its handshake itself"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def host_and_port(address: str) -> tuple[str, int]:
    """Take an address apart: host:port, or [address]:port of IPv6.

    Raises:
        ConfigError: It is neither.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535 or (":" in host and not host.startswith("[")):
        problem = f"{address!r} is no address; give host:port, and [address]:port for IPv6"
        raise ConfigError([problem], source="the command line")
    return host.strip("[]"), int(port)


def listen(address: str, keys: Path | None, num_clients: int, tell: Callable[[str], None]) -> Listener:
    """Open the server's port; without `keys` there is no TLS, and on the loopback alone.

    Raises:
        ConfigError: Without keys the address is not of the loopback.
        InputError: The keys do not fit.
        ParaBlockError: Another program listens there, which is named.
    """
    settle_environment()
    host, port = host_and_port(address)
    if keys is None:
        if host not in LOOPBACK:
            problem = f"without keys the server listens on this machine alone, not at {host}; give --keys DIR"
            raise ConfigError([problem], source="the command line")
        _check_free(host, port)
        return Listener(address, None, lambda _: None, num_clients=num_clients, tell=tell)
    credentials = load_credentials(keys)
    if not credentials.hosts:
        raise InputError(
            f"{keys} holds the certificate of {credentials.name}, not a server's",
            cause="A site's folder was given where the server's belongs.",
            remedy="Give the folder that holds server.key and server.pem.",
        )
    _check_free(host, port)
    revoked = keys / "revoked.pem"
    revocations = Revocations(revoked if revoked.exists() else None, credentials.authority)
    is_listed = revoked.exists()
    if revocations.problem:
        tell(f"nobody is let in: {revocations.problem}")
    strangers = Strangers(lambda address: listener.note_refusal(Caller(address, "", b"", ""), NO_CERTIFICATE))

    def admit(caller: Caller) -> int:
        nonlocal revocations, is_listed
        strangers.calls(caller.address)
        if not is_listed and revoked.exists():  # the first list may come while the server runs
            revocations, is_listed = Revocations(revoked, credentials.authority), True
        if revocations.is_revoked(caller.certificate):
            raise NotAdmitted(revocations.problem or f"the certificate of {caller.name} has been revoked")
        try:
            return client_id_of(caller.name)
        except ParaBlockError as problem:
            raise NotAdmitted(problem.what) from None

    showing, renewing = credentials, Lock()

    def shown() -> grpc.ServerCertificateConfiguration | None:
        """Return what the server shows from a new connection on: a renewed certificate, once; None: the one before.

        gRPC may use what it has freed where hands are shaken while it gets another one, and end the process with
        that (github.com/grpc/grpc/issues/36693). So it gets one with a renewal only, and not with each connection.
        """
        nonlocal credentials, showing
        strangers.shakes_hands()
        with renewing:
            with suppress(ParaBlockError):  # half installed: the one before stays
                credentials = load_credentials(keys)
            if credentials == showing:
                return None
            showing = credentials
            return _configuration(showing)

    # None is for no change, says gRPC, and its stubs do not
    to_show = grpc.dynamic_ssl_server_credentials(_configuration(credentials), shown, True)  # type: ignore[arg-type]
    signed = CertificateIdentity(keys)
    listener = Listener(address, to_show, admit, num_clients=num_clients, tell=tell, identity=signed)
    strangers.port = listener.port

    remind = reminder(lambda words: listener.tell(words))

    def look() -> None:
        nonlocal credentials
        strangers.look()
        if credentials.days_left <= WARN_DAYS:
            with suppress(ParaBlockError):  # a renewed one may be there, which no new connection has asked for
                credentials = load_credentials(keys)
        remind(credentials)

    listener.look = look
    look()
    return listener


def _configuration(own: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(own.key, own.certificate)], own.authority)


def _check_free(host: str, port: int) -> None:
    """Say who listens at a port.

    Raises:
        ParaBlockError: Somebody does.
    """
    if not port:
        return
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1] == port:
                name = "a process of another user"
                if connection.pid:
                    name = f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
                raise ParaBlockError(  # which a later start may find cured
                    f"port {port} of {host} is taken: {name} listens there",
                    cause="It may be an earlier server that has not ended, or another program.",
                    remedy="End it, or choose another port with --address.",
                )


def server_of(address: str, keys: Path | None, tell: Callable[[str], None]) -> ServerEnd:
    """Return how a site reaches its server.

    Keys are read anew for each connection, so that a renewal counts. Where they cannot be used by then, the site
    waits as for a server that is away: a `ConnectionError` says why, and what to do.

    Raises:
        ConfigError: Without keys the address is not of the loopback.
        InputError: The keys do not fit.
    """
    settle_environment()
    host, port = host_and_port(address)
    if keys is None:
        if host not in LOOPBACK:
            problem = f"without keys a site connects with this machine alone, not with {host}; give --keys DIR"
            raise ConfigError([problem], source="the command line")
        return ServerEnd(address, None)
    remind = reminder(tell)
    remind(load_credentials(keys))

    def now() -> Credentials:
        try:
            own = load_credentials(keys)
            remind(own)
            return own
        except ParaBlockError as problem:  # it has expired, or is half installed: its operator can cure that
            raise ConnectionError(f"{problem.what}. {problem.remedy}") from None

    def credentials() -> grpc.ChannelCredentials:
        own = now()
        return grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)

    return ServerEnd(
        address, credentials, diagnose=lambda: diagnose(host, port, now()), identity=CertificateIdentity(keys)
    )


def diagnose(host: str, port: int, credentials: Credentials) -> str:
    """Return why no connection with a server can be made, in words; empty if one can, or nothing is known."""
    try:
        with socket.create_connection((host, port), timeout=5) as plain, TemporaryDirectory() as folder:
            for name, content in (("key", credentials.key), ("certificate", credentials.certificate)):
                (Path(folder) / name).touch(mode=0o600)
                (Path(folder) / name).write_bytes(content)
            context = ssl.create_default_context(cadata=credentials.authority.decode())
            context.load_cert_chain(Path(folder) / "certificate", Path(folder) / "key")
            with context.wrap_socket(plain, server_hostname=host):
                return ""
    except ssl.SSLCertVerificationError as error:
        if "mismatch" in error.verify_message.lower() or "doesn't match" in error.verify_message.lower():
            return (
                f"the server's certificate is not for {host}; it has to name the host that sites call: "
                "make a new request at the server with --host, and have it signed"
            )
        return f"the server's certificate is not trusted: {error.verify_message}; both ends need the same authority"
    except ssl.SSLError as error:
        return f"the two ends cannot agree on TLS: {error.reason or error}"
    except OSError as error:
        return f"{host}:{port} cannot be reached: {error.strerror or error}"


def reminder(tell: Callable[[str], None]) -> Callable[[Credentials], None]:
    """Return what tells of a certificate that ends soon, once for each day that is left."""
    told: tuple[object, int] | None = None

    def remind(credentials: Credentials) -> None:
        nonlocal told
        days_left = credentials.days_left
        if days_left <= WARN_DAYS and told != (credentials.not_after, days_left):
            told = credentials.not_after, days_left
            tell(
                f"the certificate of {credentials.name} ends in {days_left} days, on "
                f"{credentials.not_after:%Y-%m-%d}; renew it with `parablock deploy keys renew`"
            )

    return remind


def check_keys(keys: Path | None, *, insecure: bool) -> None:
    """Raise a ConfigError unless there are keys, or the operator says that there are none."""
    if (keys is None) != insecure:
        problem = "both --keys and --insecure are given" if insecure else "neither --keys nor --insecure is given"
        remedy = "give --keys DIR; or --insecure, for a server and sites on one machine"
        raise ConfigError([f"{problem}; {remedy}"], source="the command line")
