"""The list of revoked certificates: how the authority signs it, and how the server reads it."""

from __future__ import annotations

import os
from pathlib import Path

from parablock.deploy.certificates import UNREADABLE, now, parse_certificate
from parablock.errors import InputError

# isort: split
from cryptography import x509  # after `certificates`, which says what to do where it is missing
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Revocations:
    """The authority's list of revoked certificates, read again whenever its file has changed.

    Without a file nobody is revoked. One that is missing, damaged or not signed by the authority revokes everybody,
    until a good one is there. Any thread may ask.

    Args:
        path: The list, or None.
        authority: The authority's certificate, PEM.
    """

    def __init__(self, path: Path | None, authority: bytes) -> None:
        self._path, self._authority = path, parse_certificate(authority, "the authority's certificate")
        self._read: tuple[object, frozenset[int], str] = (None, frozenset(), "")
        if path is not None:
            self._refresh(path)

    @property
    def problem(self) -> str:
        """Why everybody is refused; empty while the list is good."""
        return self._read[2]

    def is_revoked(self, certificate_pem: bytes) -> bool:
        """Return whether a certificate counts no more; one that cannot be read never counts."""
        try:
            certificate = parse_certificate(certificate_pem, "the certificate of a peer")
        except InputError:
            return True
        if self._path is None:
            return False
        _, serials, problem = self._refresh(self._path)
        return bool(problem) or certificate.serial_number in serials

    def _refresh(self, path: Path) -> tuple[object, frozenset[int], str]:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_mtime_ns, status.st_size, status.st_ino)
                if seen == self._read[0]:
                    return self._read
                revoked = parse_revoked(file.read(), path, self._authority)
            self._read = (seen, frozenset(entry.serial_number for entry in revoked), "")
        except OSError as error:
            self._read = (None, frozenset(), f"{path} cannot be read: {error.strerror}; everybody is refused")
        except InputError as error:
            self._read = (None, frozenset(), f"{error.what}; everybody is refused")
        return self._read


def parse_revoked(pem: bytes, path: Path, authority: x509.Certificate) -> x509.CertificateRevocationList:
    """Return a list of revoked certificates, once its signature is found to be the authority's.

    Raises:
        InputError: It is damaged, or another signed it.
    """
    remedy = "Bring revoked.pem again, from the folder of the authority or from its backup."
    try:
        revoked = x509.load_pem_x509_crl(pem)
        list(revoked)
        key = authority.public_key()
        genuine = isinstance(key, ec.EllipticCurvePublicKey) and revoked.is_signature_valid(key)
    except UNREADABLE:
        raise InputError(f"{path} is not a list of revoked certificates", remedy=remedy) from None
    if not genuine:
        raise InputError(f"{path} is not signed by {authority.subject.rfc4514_string()}", remedy=remedy)
    return revoked


def sign_revoked(
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    before: x509.CertificateRevocationList | None,
    serials: list[int],
) -> bytes:
    """Return a signed list, PEM, of what an earlier one holds, if there is one, and of new serial numbers."""
    number = 1
    if before is not None:  # an empty list is false
        number += before.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    new = x509.RevokedCertificateBuilder().revocation_date(now())
    entries = [*(before or ()), *(new.serial_number(serial).build() for serial in serials)]
    builder = (
        x509.CertificateRevocationListBuilder(revoked_certificates=entries)
        .issuer_name(authority.subject)
        .last_update(now())
        .next_update(authority.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
