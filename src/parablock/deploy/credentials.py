"""Certificates of the server and keys of the sites, made once and handed over by hand.

DIR/ca.pem                          for every site: who the server is
DIR/server/server.pem, server.key   for the server
DIR/server/site-0.pub …             for the server: who may connect
DIR/site-0/site.key, ca.pem         for that site alone: the key of its SuperNode
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from parablock.errors import InputError, StorageError

if TYPE_CHECKING:
    from cryptography import x509

VALID_DAYS = 825
"""How long the certificates are valid; browsers and some TLS stacks refuse more."""


def make_keys(directory: Path, num_sites: int, hosts: Sequence[str]) -> None:
    """Write a certificate authority, the server's certificate for its `hosts`, and a key pair for each site.

    Raises:
        StorageError: The folder holds something, or cannot be written.
        InputError: The extra `flower` is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise missing_extra() from None
    if directory.exists() and any(directory.iterdir()):
        raise StorageError(
            f"{directory} is not empty", remedy="Give a new folder: keys are never written over older ones."
        )
    now = datetime.now(UTC)

    def certificate(subject: str, public: ec.EllipticCurvePublicKey, issuer: str) -> x509.CertificateBuilder:
        def name(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=VALID_DAYS))
        )

    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    usage = {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    flags = {**usage, **dict.fromkeys((*others, "encipher_only", "decipher_only"), False)}
    ca = (
        certificate("ParaBlock run", authority.public_key(), "ParaBlock run")
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**flags), critical=True)
        .add_extension(identifier, critical=False)
        .sign(authority, hashes.SHA256())
    )
    signed = (
        certificate("ParaBlock server", server.public_key(), "ParaBlock run")
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    for folder in (directory, directory / "server", *(directory / f"site-{site}" for site in range(num_sites))):
        _write(folder / "ca.pem", ca.public_bytes(pem), secret=False)
    _write(directory / "server" / "server.pem", signed.public_bytes(pem), secret=False)
    key = server.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    _write(directory / "server" / "server.key", key, secret=True)
    for site in (f"site-{number}" for number in range(num_sites)):
        pair = ec.generate_private_key(ec.SECP384R1())
        openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        private = pair.private_bytes(pem, serialization.PrivateFormat.OpenSSH, plain)
        _write(directory / site / "site.key", private, secret=True)
        _write(directory / "server" / f"{site}.pub", pair.public_key().public_bytes(*openssh), secret=False)


def missing_extra() -> InputError:
    """Return the error that Flower is not installed."""
    return InputError(
        "deployment needs Flower, which is not installed",
        cause="It is an extra of ParaBlock.",
        remedy='Install it: pip install "parablock[flower]"',
    )


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes, *, secret: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
