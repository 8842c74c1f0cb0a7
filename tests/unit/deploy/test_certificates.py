"""A folder of credentials: what is refused before anything listens or dials, and what the refusal says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parablock.deploy import certificates
from parablock.deploy.authority import make_all
from parablock.deploy.certificates import (
    check_name,
    client_id_of,
    host_is_covered,
    load_credentials,
    uncovered_host,
)
from parablock.errors import InputError, StorageError

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "with blanks"
    make_all(folder, 2, ["FL.example.org.", "[2001:DB8::0:1]"])
    return folder


@pytest.fixture
def keys(made: Path, tmp_path: Path) -> Path:
    """A copy to break; each test shows first that it is whole."""
    copy = shutil.copytree(made, tmp_path / "with blanks")
    for name in ("server", "site-0"):
        assert load_credentials(copy / name).name == name
    return copy


def sign_by_hand(
    keys: Path, folder: str, change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder]
) -> None:
    """Give a folder a certificate of its authority for its key, with something about it changed."""
    (key_file,) = (keys / folder).glob("*.key")
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    signer = serialization.load_pem_private_key((keys / "authority" / "authority.key").read_bytes(), None)
    authority = x509.load_pem_x509_certificate((keys / "authority" / "authority.pem").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(signer, ec.EllipticCurvePrivateKey)
    before = x509.load_pem_x509_certificate(key_file.with_suffix(".pem").read_bytes())
    builder = x509.CertificateBuilder(
        issuer_name=authority.subject,
        subject_name=before.subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=before.not_valid_before_utc,
        not_valid_after=before.not_valid_after_utc,
    )
    signed = change(builder).sign(signer, hashes.SHA256())
    key_file.with_suffix(".pem").write_bytes(signed.public_bytes(PEM))


def uses(*purposes: x509.ObjectIdentifier) -> Callable[[x509.CertificateBuilder], x509.CertificateBuilder]:
    return lambda builder: builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)


def named(*parts: str) -> Callable[[x509.CertificateBuilder], x509.CertificateBuilder]:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, part) for part in parts])

    def change(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        builder._subject_name = subject
        return uses(ExtendedKeyUsageOID.CLIENT_AUTH)(builder)

    return change


def with_more_than_a_name(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    parts = [(NameOID.COMMON_NAME, "site-0"), (NameOID.ORGANIZATION_NAME, "another")]
    builder._subject_name = x509.Name([x509.NameAttribute(kind, text) for kind, text in parts])
    return uses(ExtendedKeyUsageOID.CLIENT_AUTH)(builder)


def refused(folder: Path, told: str, kind: type[InputError] = InputError) -> InputError:
    with pytest.raises(kind, match=told) as caught:
        load_credentials(folder)
    assert caught.value.remedy, "it says what to do"
    return caught.value


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610, 0o444])
def test_a_key_that_others_have_access_to_is_refused(keys: Path, mode: int):
    key = keys / "site-0" / "site.key"
    key.chmod(mode)
    error = refused(keys / "site-0", f"has the mode {mode:04o}", StorageError)
    assert f"chmod 600 '{key}'" in error.remedy
    for good in (0o600, 0o400):
        key.chmod(good)
        assert load_credentials(keys / "site-0").client_id == 0


def test_a_key_of_another_user_is_refused(keys: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    error = refused(keys / "site-0", f"belongs to user {real}, and this process is user {real + 1}", StorageError)
    assert f"chown {real + 1}" in error.remedy and "chmod 600" in error.remedy


@pytest.mark.parametrize(
    ("gone", "told", "remedy"),
    [
        ("site.key", r"neither server\.key nor site\.key", "deploy keys request"),
        ("site.pem", r"has site\.key, and no site\.pem", "deploy keys install"),
        ("authority.pem", r"has site\.key, and no authority\.pem", "deploy keys install"),
    ],
)
def test_what_is_missing_is_told_with_the_command_that_brings_it(keys: Path, gone: str, told: str, remedy: str):
    (keys / "site-0" / gone).unlink()
    assert remedy in refused(keys / "site-0", told).remedy
    assert load_credentials(keys / "site-1").client_id == 1


def test_a_folder_that_is_none_or_is_of_two_is_refused(keys: Path):
    refused(keys / "gone", "holds neither")
    shutil.copy(keys / "server" / "server.key", keys / "site-0")
    refused(keys / "site-0", "holds both")


def test_the_key_of_another_is_refused(keys: Path):
    shutil.copy(keys / "site-1" / "site.key", keys / "site-0")
    refused(keys / "site-0", r"site\.pem is not for the key")


@pytest.mark.parametrize("file", ["site.key", "site.pem", "authority.pem"])
@pytest.mark.parametrize("damage", ["empty", "cut", "altered", "bytes"])
def test_a_damaged_file_is_refused_by_its_name(keys: Path, file: str, damage: str):
    path = keys / "site-0" / file
    whole = path.read_bytes()
    middle = len(whole) // 2
    altered = whole[:middle] + (b"A" if whole[middle : middle + 1] != b"A" else b"B") + whole[middle + 1 :]
    path.write_bytes({"empty": b"", "cut": whole[:middle], "altered": altered, "bytes": b"\xff\x00" * 9}[damage])
    refused(keys / "site-0", file.replace(".", r"\."))


def test_a_file_with_two_certificates_is_refused(keys: Path):
    for path in (keys / "site-0" / "authority.pem", keys / "site-1" / "site.pem"):
        path.write_bytes(path.read_bytes() + (keys / "server" / "server.pem").read_bytes())
        refused(path.parent, f"{path.name} does not hold exactly one certificate")


def test_an_encrypted_key_and_one_of_another_kind_are_refused(keys: Path):
    path, plain = keys / "site-0" / "site.key", serialization.NoEncryption()
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    path.write_bytes(key.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"x")))
    refused(keys / "site-0", "is encrypted")
    for other in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        path.write_bytes(other.private_bytes(PEM, PKCS8, plain))
        refused(keys / "site-0", "is not a key on the curve P-256")
    path.write_bytes(key.private_bytes(PEM, PKCS8, plain))
    assert load_credentials(keys / "site-0").client_id == 0


def test_a_certificate_of_another_authority_is_refused_with_both_named(keys: Path, tmp_path: Path):
    make_all(tmp_path / "other", 1, [])
    shutil.copy(tmp_path / "other" / "site-0" / "authority.pem", keys / "site-0")
    error = refused(keys / "site-0", "is not signed by the authority")
    subjects = [load_credentials(folder / "site-0").authority for folder in (tmp_path / "other",)] + [
        (keys / "authority" / "authority.pem").read_bytes()
    ]
    assert all(x509.load_pem_x509_certificate(pem).subject.rfc4514_string() in error.what for pem in subjects)


def test_a_site_is_no_authority(keys: Path):
    """A certificate that site 1 signed with its own key, under its own name as issuer."""
    signer = serialization.load_pem_private_key((keys / "site-1" / "site.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate((keys / "site-1" / "site.pem").read_bytes())
    before = x509.load_pem_x509_certificate((keys / "site-0" / "site.pem").read_bytes())
    forged = x509.CertificateBuilder(
        issuer.subject,
        before.subject,
        before.public_key(),
        7,
        before.not_valid_before_utc,
        before.not_valid_after_utc,
    )
    signed = uses(ExtendedKeyUsageOID.CLIENT_AUTH)(forged).sign(signer, hashes.SHA256())
    signed.verify_directly_issued_by(issuer)
    (keys / "site-0" / "site.pem").write_bytes(signed.public_bytes(PEM))
    shutil.copy(keys / "site-1" / "site.pem", keys / "site-0" / "authority.pem")
    refused(keys / "site-0", "is not signed by the authority")


@pytest.mark.parametrize(
    ("days", "told", "cause"),
    [
        (366, r"site\.pem has expired: it was valid to", "this clock is fast"),
        (-1, "is not valid yet", "clock is slow"),
    ],
)
def test_dates_are_told_with_the_time_of_this_machine(
    keys: Path, monkeypatch: pytest.MonkeyPatch, days: int, told: str, cause: str
):
    here = certificates.now() + timedelta(days=days)
    monkeypatch.setattr(certificates, "now", lambda: here)
    error = refused(keys / "site-0", told)
    assert f"This machine's clock says {here:%Y-%m-%d %H:%M} (UTC)" in error.cause and cause in error.cause
    assert "clock" not in error.what, "a site that waits says the same words again, which are shown once"
    monkeypatch.undo()
    loaded = load_credentials(keys / "site-0")
    assert f"{loaded.not_after:%Y-%m-%d %H:%M}" in error.what or days < 0
    assert loaded.days_left == 364


def test_an_authority_that_has_expired_vouches_for_nobody(keys: Path, monkeypatch: pytest.MonkeyPatch):
    def for_long(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        builder._not_valid_after = (certificates.now() + timedelta(days=5000)).replace(tzinfo=None)
        return uses(CLIENT)(builder)

    sign_by_hand(keys, "site-0", for_long)
    assert load_credentials(keys / "site-0").days_left == 4999
    here = certificates.now() + timedelta(days=3651)
    monkeypatch.setattr(certificates, "now", lambda: here)
    assert "made anew" in refused(keys / "site-0", r"authority\.pem has expired").remedy


def test_the_days_that_are_left_are_whole_and_then_negative(keys: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load_credentials(keys / "site-0")
    for left, days in ((timedelta(hours=47), 1), (timedelta(hours=1), 0), (timedelta(hours=-1), -1)):
        monkeypatch.setattr(certificates, "now", lambda left=left: loaded.not_after - left)
        assert loaded.days_left == days


CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@pytest.mark.parametrize(
    ("folder", "change", "told"),
    [
        ("site-0", uses(SERVER), "is not the certificate of a site.*its use that of a server"),
        ("site-0", uses(CLIENT, SERVER), "its use that of a server and site"),
        ("site-0", uses(ExtendedKeyUsageOID.CODE_SIGNING), "its use that of neither"),
        ("site-0", lambda builder: builder, "its use that of neither"),
        ("server", uses(CLIENT), "is not the certificate of a server.*its use that of a site"),
        ("site-0", named("server"), "not the certificate of a site: its name is server"),
        ("site-0", named("site-07"), "'site-07' is not a name"),
        ("site-0", named("site-0", "site-1"), "is not a name"),
        ("site-0", named(), "is not a name"),
        ("site-0", with_more_than_a_name, "is not a name"),
    ],
)
def test_a_certificate_for_another_use_or_name_is_refused(keys: Path, folder: str, change, told: str):
    sign_by_hand(keys, folder, change)
    refused(keys / folder, told)
    sign_by_hand(keys, "server", uses(SERVER))
    sign_by_hand(keys, "site-0", named("site-4"))
    assert load_credentials(keys / "server").name == "server"
    assert load_credentials(keys / "site-0").client_id == 4


def test_secrets_are_not_printed(keys: Path):
    loaded = load_credentials(keys / "site-0")
    assert loaded.key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert "PRIVATE" not in repr(loaded) and "site-0" in repr(loaded)


@pytest.mark.parametrize("name", ["server", "site-0", "site-31", "site-999999999"])
def test_names_are_of_the_server_and_of_clients(name: str):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "site", "site-", "site--1", "site-01", "site-1 ", "site-1\n", "Site-1", "site-١"]
)
def test_other_names_are_none_and_no_client_has_two(name: str):
    with pytest.raises(InputError, match="is not a name of this federation"):
        check_name(name)


def test_the_server_is_no_client(keys: Path):
    assert client_id_of("site-12") == 12
    with pytest.raises(InputError, match="stands for no client"):
        _ = load_credentials(keys / "server").client_id


@pytest.mark.parametrize(
    "host",
    ["fl.example.org", "FL.Example.ORG", "fl.example.org.", "2001:db8::1", "[2001:DB8:0::1]", "localhost", "::1"],
)
def test_a_host_is_covered_however_it_is_spelt(made: Path, host: str):
    assert host_is_covered(load_credentials(made / "server"), host)


@pytest.mark.parametrize(
    "host", ["example.org", "x.fl.example.org", "2001:db8::2", "127.0.0.2", "", "fl.example.org:80"]
)
def test_another_host_is_not_covered_and_the_text_names_those_that_are(made: Path, host: str):
    server = load_credentials(made / "server")
    assert not host_is_covered(server, host)
    hosts = "fl.example.org, 2001:db8::1, localhost, 127.0.0.1, ::1"
    assert uncovered_host(server, host) == f"the certificate is for {hosts}, and not for {host}"
    assert "for no host" in uncovered_host(load_credentials(made / "site-0"), host)
