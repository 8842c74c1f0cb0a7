"""The identity of a site towards other sites: the key of its certificate signs the keys of secure aggregation.

Sites of a masked run see each other's certificates, which hold a name such as `site-3` and nothing of the site. A
server has no site's key, so it cannot stand in for a site.

Dates are not looked at here: TLS has checked them when the site connected, and a connection that is there outlives
its certificate, with the secrets of its session.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from parablock.deploy.authority import Credentials, load_credentials
from parablock.deploy.certificates import (
    ROLES,
    UNREADABLE,
    client_id_of,
    is_signed_by,
    name_of,
    parse_certificate,
    parse_key,
)
from parablock.errors import InputError, ParaBlockError

_ALGORITHM = ec.ECDSA(hashes.SHA256())


class CertificateIdentity:
    """Signs with the key of a site's folder, and believes whom its authority believes; see `Identity`.

    Raises:
        InputError: The folder's keys cannot be used.
    """

    def __init__(self, keys: Path) -> None:
        self._keys, self._own = keys, load_credentials(keys)

    def _credentials(self) -> Credentials:
        """Return what is in the folder; what was, if that has expired or is half installed."""
        with suppress(ParaBlockError):
            self._own = load_credentials(self._keys)
        return self._own

    def sign(self, content: bytes) -> bytes:
        """Return the site's certificate behind its length, and a signature."""
        own = self._credentials()
        certificate = parse_certificate(own.certificate, str(self._keys)).public_bytes(serialization.Encoding.DER)
        signature = parse_key(own.key, self._keys / "site.key").sign(content, _ALGORITHM)
        return len(certificate).to_bytes(2, "big") + certificate + signature

    def is_by(self, client_id: int, content: bytes, proof: bytes) -> bool:
        """Return whether the site of a client has signed; a proof may be any bytes."""
        authority = parse_certificate(self._credentials().authority, str(self._keys))
        end = 2 + int.from_bytes(proof[:2], "big")
        try:
            certificate = x509.load_der_x509_certificate(proof[2:end])
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            is_site = client_id_of(name_of(certificate)) == client_id and list(usage) == [ROLES["site"]]
            public = certificate.public_key()
            if not (is_site and is_signed_by(certificate, authority)):
                return False
            if not isinstance(public, ec.EllipticCurvePublicKey):
                return False
            public.verify(proof[end:], content, _ALGORITHM)
        except (*UNREADABLE, x509.ExtensionNotFound, InvalidSignature, InputError):
            return False
        return True
