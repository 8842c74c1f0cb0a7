"""What a server or a site sends to the authority: its name and public key, signed with its private key."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parablock.deploy.certificates import (
    ROLES,
    UNREADABLE,
    check_name,
    fingerprint_of,
    hosts_of,
    name_of,
    parse_key,
    plain_host,
    read_certificate,
    read_private,
    reading,
    role_of,
)
from parablock.errors import InputError
from parablock.storage.files import storage, write_beside

# isort: split
from cryptography import x509  # after `certificates`, which says what to do where it is missing
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PEM = serialization.Encoding.PEM
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True)
class SigningRequest:
    """What a request asks for: a name, and a server's hosts; `fingerprint` is the SHA-256 of its public key."""

    name: str
    hosts: tuple[str, ...]
    key: ec.EllipticCurvePublicKey

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the public key, which both people can compare."""
        return fingerprint_of(self.key)


def make_request(folder: Path, name: str, hosts: Sequence[str] = ()) -> Path:
    """Make a private key, unless the folder has one, and a request to sign it, whose path is returned.

    Args:
        folder: That of one site, or of the server.
        name: `server`, or `site-` and the client's number.
        hosts: Names and addresses by which sites reach the server, besides this machine's own; at a renewal, none
            means those of the certificate that is there.

    Raises:
        InputError: The name or a host is none, a site has hosts, or the folder belongs to another name.
        StorageError: The key there is open to others, or the folder cannot be written.
    """
    role = check_name(name).partition("-")[0]
    if hosts and role == "site":
        raise InputError(
            f"{name} was given hosts: {', '.join(hosts)}", remedy="Nobody connects to a site: leave them out."
        )
    if any((folder / f"{other}.key").exists() for other in ROLES if other != role):
        raise InputError(f"{folder} has the key of a {role_of(folder)}", remedy=f"Give a folder for {name} alone.")
    key_file, certificate_file = folder / f"{role}.key", folder / f"{role}.pem"
    if certificate_file.exists():
        before = read_certificate(certificate_file)
        if name_of(before) != name:
            raise InputError(
                f"{folder} belongs to {name_of(before)}, and not to {name}",
                cause="A key stands for one name only.",
                remedy=f"Give the name {name_of(before)}, or another folder.",
            )
        hosts = hosts or hosts_of(before)
    hosts = [_check_host(host) for host in hosts]
    if key_file.exists():
        key = parse_key(read_private(key_file), key_file)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        write_new(key_file, private_pem(key, None), mode=0o600)
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject_of(name))
    if role == "server":
        builder = builder.add_extension(host_names(dict.fromkeys([*hosts, *LOOPBACK])), critical=False)
    request = folder / f"{role}.csr"
    replace_file(request, builder.sign(key, hashes.SHA256()).public_bytes(PEM))
    return request


def make_renewal(folder: Path, hosts: Sequence[str] = ()) -> Path:
    """Make a request for the name that a folder's certificate has, valid or expired; its path is returned.

    Raises:
        InputError: The folder has no key or no certificate yet, or a host is none.
        StorageError: As for `make_request`.
    """
    certificate = folder / f"{role_of(folder)}.pem"
    with reading(folder):
        if not certificate.exists():
            raise InputError(
                f"{folder} has no certificate to renew",
                cause="The authority has not signed the first request yet, or its answer is not installed.",
                remedy="Make the first request: parablock deploy keys request DIR --name NAME",
            )
    return make_request(folder, name_of(read_certificate(certificate)), hosts)


def read_request(request: Path) -> SigningRequest:
    """Read a request and check that it was made with the key that it names, and asks for no more than it may.

    Raises:
        StorageError: It cannot be read.
        InputError: It is none, was altered, or asks for a name, a host or a right that is not to be had.
    """
    with reading(request):
        pem = request.read_bytes()
    again = "Ask for it again, made by: parablock deploy keys request DIR --name NAME"
    try:
        asked = x509.load_pem_x509_csr(pem)
        key, genuine, wanted = asked.public_key(), asked.is_signature_valid, list(asked.extensions)
    except UNREADABLE:
        raise InputError(f"{request} is not a certificate request in PEM", remedy=again) from None
    if not genuine:
        raise InputError(
            f"{request} is not signed by the key that it names",
            cause="It was altered, or its sender does not have that key.",
            remedy=again,
        )
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError(f"{request} is for a key that is not on the curve P-256", remedy=again)
    name, extensions = name_of(asked), [part.value for part in wanted]
    may = [x509.SubjectAlternativeName] if name == "server" else []
    if [type(value) for value in extensions] != may:
        kinds = ", ".join(type(value).__name__ for value in extensions) or "none"
        needed = "exactly its hosts" if may else "none"
        raise InputError(f"{request} for {name} asks for extensions: {kinds}; it needs {needed}", remedy=again)
    return SigningRequest(name, tuple(_check_host(host) for host in hosts_of(asked)), key)


def subject_of(name: str) -> x509.Name:
    """Return the subject of a certificate, which is a name and nothing else."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def host_names(hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    """Return names and addresses as a certificate has them."""

    def form(host: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            return x509.DNSName(host)

    return x509.SubjectAlternativeName([form(host) for host in hosts])


def _check_host(host: str) -> str:
    plain = plain_host(host)
    try:
        fits = not ipaddress.ip_address(plain).is_unspecified
    except ValueError:
        labels = plain.split(".")
        fits = len(plain) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()
    if not fits:
        raise InputError(
            f"{host!r} is not a host that a server can be reached by",
            cause="It has a port, a wildcard, a scheme or other letters, or is an address to listen at.",
            remedy="Give names such as fl.example.org (others than ASCII in their xn-- form), or addresses.",
        )
    return plain


def private_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None) -> bytes:
    """Return a private key as PKCS8, encrypted if there is a passphrase."""
    secret = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, secret)


def write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file that must not exist, with its mode from the first byte on, in a folder for this user alone."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole, over an older one if there is one."""
    with write_beside(path) as beside:
        beside.write_bytes(content)
