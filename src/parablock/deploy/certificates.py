"""Who a server or a site is, and whom it believes: the files of a folder, checked before anything listens or dials.

authority.pem            whom this end believes
site.key, site.pem       at a site: its private key, and its name as the authority signed it
server.key, server.pem   at the server: likewise, with every host that it is reached by
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parablock.errors import InputError, StorageError
from parablock.printable import as_argument

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise InputError(
        "certificates need the package cryptography, which is not installed",
        cause="It comes with an extra of ParaBlock.",
        remedy='Install it: pip install "parablock[deploy]"',
    ) from None

ROLES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "site": ExtendedKeyUsageOID.CLIENT_AUTH}
"""What the two kinds of certificates are for; neither serves as the other."""

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises at files that are not what they should be."""

_NAME = re.compile(r"server|site-(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Credentials:
    """What one end shows the other: a private key, a certificate for it, and the authority, each as PEM.

    `hosts` are the names and addresses of a server, none at a site; `not_after` is in UTC.
    """

    name: str
    key: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    authority: bytes = field(repr=False)
    not_after: datetime
    hosts: tuple[str, ...]

    @property
    def days_left(self) -> int:
        """Whole days for which the certificate is still valid; negative when it has expired."""
        return (self.not_after - now()).days

    @property
    def client_id(self) -> int:
        """The client that a site's certificate stands for.

        Raises:
            InputError: It is the server's.
        """
        return client_id_of(self.name)


def load_credentials(folder: Path) -> Credentials:
    """Read the key, certificate and authority of a folder, and check that they can be used now.

    Raises:
        StorageError: A file cannot be read, or others can read the key.
        InputError: A file is missing or damaged, or does not fit the others, or a certificate is not valid now.
    """
    role = role_of(folder)
    for name in (f"{role}.pem", "authority.pem"):
        with reading(folder):
            if not (folder / name).exists():
                raise InputError(
                    f"{folder} has {role}.key, and no {name}",
                    cause="The authority has not signed the request yet, or its answer is not installed.",
                    remedy=f"With the answer: parablock deploy keys install {as_argument(folder)} CERTIFICATE",
                )
    return check_credentials(folder / f"{role}.key", folder / f"{role}.pem", folder / "authority.pem")


def check_credentials(key_file: Path, certificate_file: Path, authority_file: Path) -> Credentials:
    """Check three files as `load_credentials` does; the key is called after its role."""
    role, key_pem = key_file.stem, read_private(key_file)
    key = parse_key(key_pem, key_file)
    certificate, authority = read_certificate(certificate_file), read_certificate(authority_file)
    again = f"In this folder: parablock deploy keys request {as_argument(key_file.parent)} --name NAME"
    if certificate.public_key() != key.public_key():
        raise InputError(
            f"{certificate_file} is not for the key {key_file}",
            cause="It was signed for another key: that of another site, or of an earlier request.",
            remedy=f"{again}, and have that request signed.",
        )
    if not is_signed_by(certificate, authority):
        raise InputError(
            f"{certificate_file} is not signed by the authority of {authority_file}: it names "
            f"{certificate.issuer.rfc4514_string()}, and that is {authority.subject.rfc4514_string()}",
            cause="The two files are not from the same authority, or one was altered.",
            remedy="Ask the authority for both files of one answer, and install them.",
        )
    renewal = f"{again}, have it signed, and install the answer; the key stays."
    check_dates(certificate, certificate_file, renewal)
    check_dates(authority, authority_file, "The authority has to be made anew, and every request signed again.")
    name, purposes = name_of(certificate), list(_extension(certificate, x509.ExtendedKeyUsage) or ())
    if name.partition("-")[0] != role or purposes != [ROLES[role]]:
        uses = " and ".join(kind for kind, purpose in ROLES.items() if purpose in purposes)
        raise InputError(
            f"{certificate_file} is not the certificate of a {role}: its name is {name}, and its use that of "
            f"{'a ' + uses if uses else 'neither server nor site'}",
            cause="A server and a site were mistaken for each other, or another program signed it.",
            remedy="Have the request of this folder signed by: parablock deploy keys sign",
        )
    pem = serialization.Encoding.PEM
    return Credentials(
        name=name,
        key=key_pem,
        certificate=certificate.public_bytes(pem),
        authority=authority.public_bytes(pem),
        not_after=certificate.not_valid_after_utc,
        hosts=hosts_of(certificate),
    )


def key_and_end(pem: bytes) -> tuple[str, datetime]:
    """Return the fingerprint of a certificate's key, as the authority shows it, and when the certificate ends."""
    certificate = x509.load_pem_x509_certificate(pem)
    return fingerprint_of(certificate.public_key()), certificate.not_valid_after_utc


def host_is_covered(credentials: Credentials, host: str) -> bool:
    """Return whether a server's certificate is for a host, a name or an address."""
    return plain_host(host) in credentials.hosts


def uncovered_host(credentials: Credentials, host: str) -> str:
    """Say which hosts a certificate is for, and that `host` is not among them."""
    return f"the certificate is for {', '.join(credentials.hosts) or 'no host'}, and not for {plain_host(host)}"


def now() -> datetime:
    """Return what this machine's clock says, in UTC."""
    return datetime.now(UTC)


def check_name(name: str) -> str:
    """Return a name if it is `server` or `site-N`, without leading zeros; refuse others."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a name of this federation",
            cause="A certificate's name is the server's or the client's that it stands for.",
            remedy="The names are: server, site-0, site-1, …",
        )
    return name


def client_id_of(name: str) -> int:
    """Return N of `site-N`; refuse other names."""
    if check_name(name) == "server":
        raise InputError(
            "the certificate of the server stands for no client",
            cause="The server's folder was given where a site's belongs.",
            remedy="Give the folder of the site, which holds site.key and site.pem.",
        )
    return int(name.removeprefix("site-"))


def role_of(folder: Path) -> str:
    """Return `server` or `site`, whichever key the folder holds; refuse it when it holds none or both."""
    with reading(folder):
        found = [role for role in ROLES if (folder / f"{role}.key").exists()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{folder} holds both server.key and site.key", remedy="Give each a folder of its own.")
    raise InputError(
        f"{folder} holds neither server.key nor site.key",
        cause="It is another folder, or no key has been made in it yet.",
        remedy=f"Make one: parablock deploy keys request {as_argument(folder)} --name NAME",
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn failures to read a file into a `StorageError` that names it."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror}",
            cause="There is no such file, or it belongs to another user.",
            remedy="Check the path, and the user that this process runs as.",
        ) from None


def read_private(path: Path) -> bytes:
    """Read a file that is for this user alone.

    Raises:
        StorageError: It cannot be read, is another user's, or is open to others.
    """
    with reading(path), path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid():
            raise StorageError(
                f"{path} belongs to user {status.st_uid}, and this process is user {os.geteuid()}",
                cause="Whoever owns a private key can use it.",
                remedy=f"sudo chown {os.geteuid()} {as_argument(path)}; chmod 600 {as_argument(path)}",
            )
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StorageError(
                f"{path} has the mode {stat.S_IMODE(status.st_mode):04o}: other users of this machine have access",
                cause="It was copied or unpacked without its mode.",
                remedy=f"chmod 600 {as_argument(path)}; where others may have read it, replace it.",
            )
        return file.read()


def parse_key(pem: bytes, path: Path, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Return a private key on the curve P-256; refuse others, and a passphrase that does not open it."""
    encrypted = b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in pem
    if encrypted != (passphrase is not None):
        raise InputError(
            f"{path} is {'' if encrypted else 'not '}encrypted",
            cause=f"{'No' if encrypted else 'A'} passphrase was given.",
            remedy=f"Give {'its' if encrypted else 'no'} passphrase.",
        )
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except UNREADABLE:
        what = "cannot be opened with this passphrase" if encrypted else "is not a private key in PEM"
        raise InputError(
            f"{path} {what}",
            cause="It is another's, or the file is damaged.",
            remedy="Try again with the right one, or bring the file back from a backup.",
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError(
            f"{path} is not a key on the curve P-256",
            cause="Another program made it.",
            remedy="Use a new folder, and let `parablock deploy keys request` make the key.",
        )
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """Read the one certificate of a file."""
    with reading(path):
        pem = path.read_bytes()
    return parse_certificate(pem, str(path))


def parse_certificate(pem: bytes, source: str) -> x509.Certificate:
    """Return the one certificate of a PEM text; refuse none, several, and what is damaged."""
    try:
        (certificate,) = x509.load_pem_x509_certificates(pem)
        certificate.public_key()
        list(certificate.extensions)
    except UNREADABLE:
        raise InputError(
            f"{source} does not hold exactly one certificate in PEM",
            cause="It is another file, or was damaged or altered on its way.",
            remedy="Bring the file again from where it was made.",
        ) from None
    return certificate


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether an authority vouches for a certificate."""
    constraints = _extension(authority, x509.BasicConstraints)
    try:
        certificate.verify_directly_issued_by(authority)
    except (*UNREADABLE, InvalidSignature):
        return False
    return constraints is not None and bool(constraints.ca)


def check_dates(certificate: x509.Certificate, path: Path, remedy: str) -> None:
    """Refuse a certificate that is not valid at this moment; `remedy` is for one that has expired."""
    first, last, here = certificate.not_valid_before_utc, certificate.not_valid_after_utc, now()
    if here < first:
        raise InputError(
            f"{path} is not valid yet: it is from {first:%Y-%m-%d %H:%M} (UTC) on",
            cause=f"This machine's clock says {here:%Y-%m-%d %H:%M} (UTC). This clock is slow, or that of the "
            "authority was fast when it signed.",
            remedy="Compare both clocks (date -u), and set the wrong one right.",
        )
    if here > last:
        raise InputError(
            f"{path} has expired: it was valid to {last:%Y-%m-%d %H:%M} (UTC)",
            cause=f"This machine's clock says {here:%Y-%m-%d %H:%M} (UTC). It was not renewed in time; or this "
            "clock is fast.",
            remedy=remedy,
        )


def name_of(signed: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """Return the name that a certificate or a request is for; refuse a subject that is more or less than a name."""
    names = [str(part.value) for part in signed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or len(list(signed.subject)) != 1:
        return check_name(signed.subject.rfc4514_string())
    return check_name(names[0])


def hosts_of(signed: x509.Certificate | x509.CertificateSigningRequest) -> tuple[str, ...]:
    """Return the names and addresses of a certificate or a request; other kinds of names are kept as they print."""
    return tuple(str(name.value) for name in _extension(signed, x509.SubjectAlternativeName) or ())


def plain_host(host: str) -> str:
    """Return a host as certificates here spell it: lower case, addresses in their short form without brackets."""
    bare = host.strip().lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(bare.removeprefix("[").removesuffix("]")))
    except ValueError:
        return bare


def fingerprint_of(key: Any) -> str:
    """Return the SHA-256 of a public key, which two people can compare."""
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(*form))
    return digest.finalize().hex()


def _extension(certificate: x509.Certificate | x509.CertificateSigningRequest, kind: type[Any]) -> Any:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
