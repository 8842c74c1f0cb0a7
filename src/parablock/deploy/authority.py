"""The authority of a federation: who may be its server, and who its sites.

An end makes its key and a request (`make_request`); the authority signs it (`sign_request`); the end installs the
answer (`install_certificate`). No private key ever leaves its folder. The folder of the authority holds

authority.pem, authority.key   its certificate; its key, encrypted
issued.jsonl                   a line for each certificate that it signed, appended to only
revoked.pem                    the signed list of those that count no more, for the server

What the ends need is in `certificates`, `revocations` and `signing_request`, and can be imported from here too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from parablock.deploy.certificates import (
    ROLES,
    Credentials,
    check_credentials,
    check_dates,
    check_name,
    host_is_covered,
    load_credentials,
    now,
    parse_certificate,
    parse_key,
    read_certificate,
    read_private,
    reading,
    role_of,
    uncovered_host,
)
from parablock.deploy.revocations import Revocations, parse_revoked, sign_revoked
from parablock.deploy.signing_request import (
    PEM,
    SigningRequest,
    host_names,
    make_renewal,
    make_request,
    private_pem,
    read_request,
    replace_file,
    subject_of,
    write_new,
)
from parablock.errors import InputError, StorageError
from parablock.storage.files import lock_folder, storage

# isort: split
from cryptography import x509  # after `certificates`, which says what to do where it is missing
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = [
    "Credentials", "Issued", "Revocations", "SigningRequest", "host_is_covered", "install_certificate",
    "key_is_encrypted", "list_issued", "load_credentials", "make_all", "make_authority", "make_renewal",
    "make_request", "read_request", "revoke", "sign_request", "uncovered_host",
]  # fmt: skip

AUTHORITY_DAYS = 3650
_BACKDATED = timedelta(hours=1)  # for the clocks of others that are slow


@dataclass(frozen=True)
class Issued:
    """A line of `issued.jsonl`: `fingerprint` is the SHA-256 of the certificate, `key` that of its public key."""

    serial: int
    name: str
    not_after: datetime
    fingerprint: str
    key: str

    def line(self) -> str:
        """Return it as JSON; the serial number is hexadecimal, as `openssl` prints it."""
        return json.dumps({**asdict(self), "serial": f"{self.serial:X}", "not_after": self.not_after.isoformat()})


def make_authority(folder: Path, *, passphrase: bytes | None) -> None:
    """Make an authority: certificate, key, an empty list of revoked certificates and one of those issued.

    Raises:
        StorageError: There is one in the folder already, or it cannot be written.
        InputError: The passphrase is empty.
    """
    if passphrase == b"":
        raise InputError("the passphrase is empty", remedy="Give one, or say --unencrypted for a trial.")
    for name in ("authority.key", "authority.pem", "revoked.pem", "issued.jsonl"):
        if (folder / name).exists():
            raise StorageError(
                f"{folder} holds {name} already",
                cause="An authority was made there; its certificates would be worth nothing without it.",
                remedy="Use that one, or give a new folder.",
            )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = subject_of(f"ParaBlock authority {os.urandom(4).hex()}")  # two of them can be told apart
    builder = _certificate(subject, subject, key.public_key(), key.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    write_new(folder / "authority.key", private_pem(key, passphrase), mode=0o600)
    write_new(folder / "issued.jsonl", b"", mode=0o600)
    write_new(folder / "revoked.pem", sign_revoked(certificate, key, None, []), mode=0o644)
    write_new(folder / "authority.pem", certificate.public_bytes(PEM), mode=0o644)


def sign_request(
    request: Path,
    authority_dir: Path,
    *,
    passphrase: bytes | None,
    days: int = 365,
    replace: bool = False,
    output_dir: Path | None = None,
) -> Path:
    """Sign a request; write `<name>.pem`, whose path is returned, and `authority.pem` beside it.

    Args:
        request: What the site or the server sent.
        authority_dir: The folder of the authority.
        passphrase: That of its key; None where it is not encrypted.
        days: How long the certificate is valid.
        replace: The name gets another key than it has; what it had is revoked.
        output_dir: A folder for both files; default: that of the request.

    Raises:
        InputError: The request is refused, or the name has a valid certificate for another key.
        StorageError: Something cannot be read or written.
    """
    asked = read_request(request)
    folder = output_dir or request.parent
    with _at_work(authority_dir):
        authority, key = _open(authority_dir, passphrase)
        longest = (authority.not_valid_after_utc - now()).days
        if not 1 <= days <= longest:
            raise InputError(
                f"a certificate of {days} days cannot be signed",
                cause=f"This authority is valid for {longest} days more, and no certificate outlives it.",
                remedy=f"Give 1 to {longest} days.",
            )
        others = [one for one, state in list_issued(authority_dir) if (one.name, state) == (asked.name, "valid")]
        others = [one for one in others if one.key != asked.fingerprint]
        if others and not replace:
            raise InputError(
                f"{asked.name} has a certificate for another key, valid to {others[-1].not_after:%Y-%m-%d}",
                cause="The site made a new key, or somebody else asks for its name.",
                remedy=f"Ask the site whether its key is {asked.fingerprint}. If so, sign with --replace, which "
                "revokes the other; a renewal in the site's old folder keeps its key.",
            )
        _place_authority(folder, authority)
        builder = _certificate(subject_of(asked.name), authority.subject, asked.key, key.public_key(), days)
        purpose = ROLES[asked.name.partition("-")[0]]
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage("digital_signature"), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if asked.hosts:
            builder = builder.add_extension(host_names(asked.hosts), critical=False)
        signed = builder.sign(key, hashes.SHA256())
        _record(authority_dir, signed, asked)  # first: a certificate that is not on the list could not be revoked
        _revoke(authority_dir, others, authority, key)
        certificate = folder / f"{asked.name}.pem"
        replace_file(certificate, signed.public_bytes(PEM))
    return certificate


def install_certificate(folder: Path, certificate: Path, authority: Path) -> Credentials:
    """Put what the authority answered into the folder of the key, if all three fit; a renewal replaces the old one.

    Raises:
        InputError: They do not fit, or the folder believes another authority.
        StorageError: Something cannot be read or written.
    """
    role = role_of(folder)
    checked = check_credentials(folder / f"{role}.key", certificate, authority)
    _place_authority(folder, parse_certificate(checked.authority, str(authority)))
    replace_file(folder / f"{role}.pem", checked.certificate)
    return checked


def revoke(authority_dir: Path, name: str, *, passphrase: bytes | None) -> list[int]:
    """Put all valid certificates of a name on the list of revoked ones; return their serial numbers.

    Raises:
        InputError: The name was never signed.
        StorageError: Something cannot be read or written.
    """
    check_name(name)
    with _at_work(authority_dir):
        authority, key = _open(authority_dir, passphrase)
        issued = list_issued(authority_dir)
        if name not in {one.name for one, _ in issued}:
            names = ", ".join(sorted({one.name for one, _ in issued})) or "nobody"
            raise InputError(f"{name} has no certificate of {authority_dir}", remedy=f"Signed were: {names}.")
        valid = [one for one, state in issued if (one.name, state) == (name, "valid")]
        _revoke(authority_dir, valid, authority, key)
    return [one.serial for one in valid]


def list_issued(authority_dir: Path) -> list[tuple[Issued, str]]:
    """Return all certificates ever signed, oldest first, each with `valid`, `expired` or `revoked`."""
    revoked = {entry.serial_number for entry in _revoked(authority_dir)}
    found, log = [], authority_dir / "issued.jsonl"
    with reading(log):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row |= {"serial": int(row["serial"], 16), "not_after": datetime.fromisoformat(row["not_after"])}
            one = Issued(**row)
            state = "revoked" if one.serial in revoked else "valid" if one.not_after > now() else "expired"
        except (ValueError, TypeError, KeyError):
            raise StorageError(
                f"{log}, line {number} of {len(lines)}, is not a record of a certificate",
                cause="It was edited; or, if it is the last, the machine stopped while it was written.",
                remedy="Remove the line if it is the last: what it stood for was not handed out. Otherwise bring "
                "the file back from a backup.",
            ) from None
        found.append((one, state))
    return found


def make_all(folder: Path, num_sites: int, hosts: Sequence[str]) -> None:
    """Make an authority, a server and sites at once, for trials on one machine: no key is encrypted.

    The folders are `authority`, `server`, `site-0` and so on.

    Raises:
        StorageError: The folder holds something, or cannot be written.
        InputError: A host is none.
    """
    with storage(folder):
        if folder.exists() and any(folder.iterdir()):
            raise StorageError(f"{folder} is not empty", remedy="Give a new folder: keys are never overwritten.")
    make_authority(folder / "authority", passphrase=None)
    for name in ("server", *(f"site-{site}" for site in range(num_sites))):
        request = make_request(folder / name, name, hosts if name == "server" else ())
        signed = folder / "authority" / "signed"
        answer = sign_request(request, folder / "authority", passphrase=None, output_dir=signed)
        install_certificate(folder / name, answer, signed / "authority.pem")


def key_is_encrypted(authority_dir: Path) -> bool:
    """Return whether the authority's key needs a passphrase."""
    return b"ENCRYPTED" in read_private(authority_dir / "authority.key")


def _open(folder: Path, passphrase: bytes | None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate, key_file = read_certificate(folder / "authority.pem"), folder / "authority.key"
    key = parse_key(read_private(key_file), key_file, passphrase)
    if certificate.public_key() != key.public_key():
        raise InputError(f"authority.pem and authority.key in {folder} do not fit", remedy="Use a backup of both.")
    check_dates(certificate, folder / "authority.pem", "Make a new authority, and sign every request again.")
    return certificate, key


def _at_work(folder: Path) -> AbstractContextManager[None]:
    return lock_folder(folder, "Wait for its end, and try again.")


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - _BACKDATED)
        .not_valid_after(now() + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*rights: str) -> x509.KeyUsage:
    known = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    others = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{right: right in rights for right in (*known, *others)})


def _place_authority(folder: Path, authority: x509.Certificate) -> None:
    path = folder / "authority.pem"
    if not path.exists():
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, authority.public_bytes(PEM))
    elif read_certificate(path) != authority:
        raise InputError(
            f"{path} is of another authority: {read_certificate(path).subject.rfc4514_string()}, and not "
            f"{authority.subject.rfc4514_string()}",
            cause="Whom a folder believes is never changed on the quiet.",
            remedy="If the federation has a new authority, remove that file first.",
        )


def _record(authority_dir: Path, signed: x509.Certificate, asked: SigningRequest) -> None:
    digest = signed.fingerprint(hashes.SHA256()).hex()
    one = Issued(signed.serial_number, asked.name, signed.not_valid_after_utc, digest, asked.fingerprint)
    log = authority_dir / "issued.jsonl"
    with storage(log), log.open("a", encoding="utf-8") as file:
        file.write(one.line() + "\n")
        file.flush()
        os.fsync(file.fileno())


def _revoked(authority_dir: Path) -> x509.CertificateRevocationList:
    path = authority_dir / "revoked.pem"
    with reading(path):
        pem = path.read_bytes()
    return parse_revoked(pem, path, read_certificate(authority_dir / "authority.pem"))


def _revoke(
    authority_dir: Path, issued: list[Issued], authority: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> None:
    if issued:
        content = sign_revoked(authority, key, _revoked(authority_dir), [one.serial for one in issued])
        replace_file(authority_dir / "revoked.pem", content)
