"""An authority at work: what it signs, refuses and revokes, seen by its own checks, by OpenSSL and in real TLS."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from parablock.deploy import authority, certificates
from parablock.deploy.authority import (
    Revocations,
    install_certificate,
    key_is_encrypted,
    list_issued,
    load_credentials,
    make_all,
    make_authority,
    make_request,
    read_request,
    revoke,
    sign_request,
)
from parablock.errors import InputError, StorageError
from parablock.storage.files import lock_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a server and two sites, and of another federation; only to be read."""
    folder = tmp_path_factory.mktemp("keys")
    make_all(folder / "ours", 2, ["fl.example.org", "10.0.0.7"])
    make_all(folder / "theirs", 1, ["fl.example.org"])
    return folder


@pytest.fixture
def ours(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(made / "ours", tmp_path / "ours")


def set_clock(monkeypatch: pytest.MonkeyPatch, **shift: int) -> None:
    moved = timedelta(**shift)
    real = certificates.now
    for module in (authority, certificates):
        monkeypatch.setattr(module, "now", lambda: real() + moved)


def sign(folder: Path, authority_dir: Path, **options: int | bool | bytes | None) -> Path:
    """Sign what is in a folder, install the answer, and return its place."""
    (request,) = folder.glob("*.csr")
    answer = sign_request(
        request, authority_dir, output_dir=authority_dir / "signed", **{"passphrase": None, **options}
    )
    install_certificate(folder, answer, answer.with_name("authority.pem"))
    return answer


# -- making ---------------------------------------------------------------------------------------------------


def test_secrets_are_for_this_user_alone_and_the_folders_can_be_used(made: Path):
    secrets = {path.relative_to(made / "ours").as_posix() for path in (made / "ours").rglob("*.key")}
    assert secrets == {"authority/authority.key", "server/server.key", "site-0/site.key", "site-1/site.key"}
    assert all((made / "ours" / path).stat().st_mode & 0o077 == 0 for path in secrets)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (made / "ours").iterdir())
    loaded = [load_credentials(made / "ours" / name) for name in ("server", "site-0", "site-1")]
    assert [one.name for one in loaded] == ["server", "site-0", "site-1"]
    assert [one.client_id for one in loaded[1:]] == [0, 1]
    assert [one.hosts for one in loaded] == [
        ("fl.example.org", "10.0.0.7", "localhost", "127.0.0.1", "::1"),
        (),
        (),
    ]
    assert {one.days_left for one in loaded} == {364}


def test_an_authority_is_never_written_over(ours: Path):
    before = {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()}
    with pytest.raises(StorageError, match=r"holds authority\.key already"):
        make_authority(ours / "authority", passphrase=None)
    with pytest.raises(StorageError, match="not empty"):
        make_all(ours, 1, [])
    assert {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()} == before
    make_authority(ours / "another", passphrase=None)
    assert list_issued(ours / "another") == []


def test_an_encrypted_key_opens_with_its_passphrase_alone(tmp_path: Path, made: Path):
    place = tmp_path / "authority"
    make_authority(place, passphrase=b"three words here")
    assert key_is_encrypted(place) and not key_is_encrypted(made / "ours" / "authority")
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in (place / "authority.key").read_bytes()
    request = make_request(tmp_path / "site", "site-0")
    for wrong, told in (
        (None, "No passphrase was given"),
        (b"other words", "cannot be opened with this passphrase"),
    ):
        with pytest.raises(InputError, match=told):
            sign_request(request, place, passphrase=wrong)
    assert list_issued(place) == [] and not (tmp_path / "site" / "site-0.pem").exists()
    assert sign_request(request, place, passphrase=b"three words here").name == "site-0.pem"
    with pytest.raises(InputError, match="is not encrypted"):
        sign_request(request, made / "ours" / "authority", passphrase=b"three words here")
    with pytest.raises(InputError, match="empty"):
        make_authority(tmp_path / "new", passphrase=b"")
    assert not (tmp_path / "new").exists()


def test_an_authority_key_that_others_can_read_signs_nothing(ours: Path):
    (ours / "authority" / "authority.key").chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        sign(ours / "site-0", ours / "authority")
    (ours / "authority" / "authority.key").chmod(0o600)
    sign(ours / "site-0", ours / "authority")


def test_the_key_of_another_authority_signs_nothing(ours: Path, made: Path):
    shutil.copy(made / "theirs" / "authority" / "authority.key", ours / "authority")
    with pytest.raises(InputError, match="do not fit"):
        sign(ours / "site-0", ours / "authority")


# -- signing --------------------------------------------------------------------------------------------------


def test_a_certificate_can_do_what_its_name_needs_and_nothing_else(made: Path):
    for name, purpose in (("server", ExtendedKeyUsageOID.SERVER_AUTH), ("site-0", ExtendedKeyUsageOID.CLIENT_AUTH)):
        signed = x509.load_pem_x509_certificate(load_credentials(made / "ours" / name).certificate)
        extensions = {type(one.value): one for one in signed.extensions}
        assert list(extensions[x509.ExtendedKeyUsage].value) == [purpose]
        constraints = extensions[x509.BasicConstraints]
        assert (constraints.critical, constraints.value.ca) == (True, False)
        usage = extensions[x509.KeyUsage].value
        assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
        assert (x509.SubjectAlternativeName in extensions) == (name == "server")


def test_a_renewal_keeps_the_key_and_the_hosts(ours: Path):
    for name in ("server", "site-0"):
        before = load_credentials(ours / name)
        make_request(ours / name, name)
        sign(ours / name, ours / "authority", days=30)
        after = load_credentials(ours / name)
        assert (after.key, after.hosts, after.name) == (before.key, before.hosts, before.name)
        assert after.certificate != before.certificate and after.days_left == 29


def test_a_name_gets_another_key_only_where_it_is_replaced_and_then_the_old_one_is_revoked(ours: Path):
    place = ours / "authority"
    old = load_credentials(ours / "site-0")
    request = make_request(ours / "new", "site-0")
    with pytest.raises(InputError, match="site-0 has a certificate for another key") as caught:
        sign(ours / "new", place)
    assert read_request(request).fingerprint in caught.value.remedy
    assert len(list_issued(place)) == 3, "nothing was recorded"
    sign(ours / "new", place, replace=True)
    revocations = Revocations(place / "revoked.pem", old.authority)
    assert revocations.is_revoked(old.certificate)
    assert not revocations.is_revoked(load_credentials(ours / "new").certificate)
    assert not revocations.is_revoked(load_credentials(ours / "site-1").certificate)
    sign(ours / "new", place)  # which is no other key any more


def test_a_name_whose_certificate_is_revoked_or_has_expired_is_free(ours: Path, monkeypatch: pytest.MonkeyPatch):
    revoke(ours / "authority", "site-0", passphrase=None)
    make_request(ours / "new", "site-0")
    sign(ours / "new", ours / "authority")
    make_request(ours / "later", "site-1")
    with pytest.raises(InputError, match="another key"):
        sign(ours / "later", ours / "authority")
    set_clock(monkeypatch, days=366)
    sign(ours / "later", ours / "authority")


@pytest.mark.parametrize("days", [-1, 0, 3650])
def test_a_certificate_does_not_outlive_its_authority(ours: Path, days: int):
    with pytest.raises(InputError, match=f"of {days} days") as caught:
        sign(ours / "site-0", ours / "authority", days=days)
    assert "1 to 3649" in caught.value.remedy
    sign(ours / "site-0", ours / "authority", days=3649)
    assert load_credentials(ours / "site-0").days_left == 3648


def test_an_authority_that_has_expired_signs_nothing(ours: Path, monkeypatch: pytest.MonkeyPatch):
    set_clock(monkeypatch, days=3651)
    with pytest.raises(InputError, match=r"authority\.pem has expired(.|\n)*This machine's clock says"):
        sign(ours / "site-0", ours / "authority")


def test_an_answer_is_not_put_beside_another_authority(ours: Path, made: Path, tmp_path: Path):
    shutil.copy(made / "theirs" / "authority" / "authority.pem", tmp_path)
    with pytest.raises(InputError, match="is of another authority"):
        sign_request(ours / "site-0" / "site.csr", ours / "authority", passphrase=None, output_dir=tmp_path)
    assert len(list_issued(ours / "authority")) == 3
    (tmp_path / "authority.pem").unlink()
    sign_request(ours / "site-0" / "site.csr", ours / "authority", passphrase=None, output_dir=tmp_path)
    assert {path.name for path in tmp_path.glob("*.pem")} == {"site-0.pem", "authority.pem"}


def test_two_do_not_sign_at_once(ours: Path):
    with lock_folder(ours / "authority"), pytest.raises(StorageError, match="another process is at work"):
        sign(ours / "site-0", ours / "authority")
    sign(ours / "site-0", ours / "authority")


# -- the record -----------------------------------------------------------------------------------------------


def test_the_record_names_what_was_signed_and_is_only_appended_to(ours: Path):
    log = ours / "authority" / "issued.jsonl"
    before = log.read_text()
    sign(ours / "site-1", ours / "authority")
    assert log.read_text().startswith(before)
    row = json.loads(log.read_text().splitlines()[-1])
    loaded = load_credentials(ours / "site-1")
    signed = x509.load_pem_x509_certificate(loaded.certificate)
    assert (int(row["serial"], 16), row["name"]) == (signed.serial_number, "site-1")
    assert (row["not_after"], row["fingerprint"]) == (
        loaded.not_after.isoformat(),
        signed.fingerprint(hashes.SHA256()).hex(),
    )
    states = [(one.name, state) for one, state in list_issued(ours / "authority")]
    assert states == [(name, "valid") for name in ("server", "site-0", "site-1", "site-1")]


@pytest.mark.parametrize("line", ['{"serial": "1F", "na', "[]", "1", '{"serial": "xyz", "not_after": ""}'])
def test_a_damaged_record_is_told_by_its_line(ours: Path, line: str):
    log = ours / "authority" / "issued.jsonl"
    whole = log.read_text()
    log.write_text(whole + line)
    with pytest.raises(StorageError, match="line 4 of 4"):
        sign(ours / "site-0", ours / "authority")
    log.write_text(whole)
    sign(ours / "site-0", ours / "authority")


# -- revoking -------------------------------------------------------------------------------------------------


def test_a_revocation_takes_all_valid_certificates_of_a_name_and_no_other(
    ours: Path, monkeypatch: pytest.MonkeyPatch
):
    place = ours / "authority"
    sign(ours / "site-0", place)
    serials = revoke(place, "site-0", passphrase=None)
    assert len(serials) == 2 == len(set(serials))
    assert revoke(place, "site-0", passphrase=None) == []
    states = [(one.name, state) for one, state in list_issued(place)]
    valid, revoked = ("valid", "revoked")
    assert states == [("server", valid), ("site-0", revoked), ("site-1", valid), ("site-0", revoked)]
    set_clock(monkeypatch, days=366)
    assert revoke(place, "site-1", passphrase=None) == [], "it has expired"
    monkeypatch.undo()
    assert len(revoke(place, "site-1", passphrase=None)) == 1
    revoked_list = x509.load_pem_x509_crl((place / "revoked.pem").read_bytes())
    assert len(list(revoked_list)) == 3
    assert revoked_list.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3


@pytest.mark.parametrize(
    ("name", "told"), [("site-7", "Signed were: server, site-0, site-1"), ("site_0", "is not a name")]
)
def test_a_name_that_was_never_signed_cannot_be_revoked(ours: Path, name: str, told: str):
    before = (ours / "authority" / "revoked.pem").read_bytes()
    with pytest.raises(InputError, match=told):
        revoke(ours / "authority", name, passphrase=None)
    assert (ours / "authority" / "revoked.pem").read_bytes() == before


# -- installing -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_key_is_not_installed(ours: Path, made: Path):
    before = {path: path.read_bytes() for path in (ours / "site-0").iterdir()}
    signed, theirs = ours / "authority" / "signed", made / "theirs" / "authority" / "signed"
    for answer, authority_file, told in (
        (signed / "site-1.pem", signed / "authority.pem", "is not for the key"),
        (signed / "site-0.pem", theirs / "authority.pem", "is not signed by the authority"),
        (theirs / "site-0.pem", theirs / "authority.pem", "is not for the key"),
        (signed / "gone.pem", signed / "authority.pem", "cannot be read"),
    ):
        with pytest.raises(InputError, match=told):
            install_certificate(ours / "site-0", answer, authority_file)
    assert {path: path.read_bytes() for path in (ours / "site-0").iterdir()} == before
    install_certificate(ours / "site-0", signed / "site-0.pem", signed / "authority.pem")


def test_whom_a_folder_believes_is_not_changed_by_an_answer(ours: Path, made: Path):
    theirs = shutil.copytree(made / "theirs" / "authority", ours / "theirs")
    answer = sign_request(
        ours / "site-0" / "site.csr", theirs, passphrase=None, replace=True, output_dir=theirs / "signed"
    )
    with pytest.raises(InputError, match="is of another authority"):
        install_certificate(ours / "site-0", answer, theirs / "authority.pem")
    assert load_credentials(ours / "site-0").authority == load_credentials(ours / "site-1").authority
    (ours / "site-0" / "authority.pem").unlink()
    install_certificate(ours / "site-0", answer, theirs / "authority.pem")
    assert load_credentials(ours / "site-0").authority != load_credentials(ours / "site-1").authority


# -- as others see it -----------------------------------------------------------------------------------------


def shake_hands(server: Path, client: Path, host: str = "localhost") -> str:
    """Shake hands on the loopback with the files of two folders; return what went wrong at either end."""
    ends = {}
    for folder, side in ((server, ssl.PROTOCOL_TLS_SERVER), (client, ssl.PROTOCOL_TLS_CLIENT)):
        (key,) = folder.glob("*.key")
        ends[side] = context = ssl.SSLContext(side)
        context.load_cert_chain(key.with_suffix(".pem"), key)
        context.load_verify_locations(folder / "authority.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    errors: list[str] = []

    def serve(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        peer.settimeout(20)
        with peer:
            try:
                with ends[ssl.PROTOCOL_TLS_SERVER].wrap_socket(peer, server_side=True) as secured:
                    secured.sendall(secured.getpeercert()["subject"][0][0][1].encode())
            except OSError as error:
                errors.append(f"server: {error}")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=20) as plain,
                ends[ssl.PROTOCOL_TLS_CLIENT].wrap_socket(plain, server_hostname=host) as secured,
            ):
                heard = secured.recv(100).decode()
        except OSError as error:
            errors.append(f"client: {error}")
            heard = ""
        thread.join()
    assert bool(heard) != bool(errors)
    return "; ".join(errors) or f"hello {heard}"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "fl.example.org", "10.0.0.7"])
def test_a_server_and_a_site_of_one_authority_know_each_other(made: Path, host: str):
    assert shake_hands(made / "ours/server", made / "ours/site-1", host) == "hello site-1"


@pytest.mark.parametrize(
    ("server", "client", "host", "told"),
    [
        ("ours/server", "theirs/site-0", "localhost", r"client: .*certificate verify failed"),
        ("theirs/server", "ours/site-0", "localhost", r"client: .*certificate verify failed"),
        ("ours/server", "ours/server", "localhost", r"server: .*unsuitable certificate purpose"),
        ("ours/site-0", "ours/site-1", "localhost", r"client: .*unsuitable certificate purpose"),
        ("ours/server", "ours/site-0", "other.example.org", r"client: .*Hostname mismatch"),
        ("ours/server", "ours/site-0", "10.0.0.8", r"client: .*IP address mismatch"),
    ],
)
def test_strangers_and_certificates_of_the_wrong_kind_are_refused(
    made: Path, server: str, client: str, host: str, told: str
):
    outcome = shake_hands(made / server, made / client, host)
    assert pytest.RaisesExc(AssertionError, match=told).matches(AssertionError(outcome)), outcome


def test_a_client_of_another_authority_is_refused_by_the_server_too(made: Path, ours: Path):
    """It believes our authority, which is public, and shows a certificate of its own."""
    shutil.copytree(made / "theirs" / "site-0", ours / "stranger")
    shutil.copy(ours / "server" / "authority.pem", ours / "stranger")
    assert "server: " in (refused := shake_hands(ours / "server", ours / "stranger"))
    assert "certificate verify failed" in refused


def test_an_expired_certificate_is_refused_and_its_renewal_for_the_same_key_is_not(
    ours: Path, monkeypatch: pytest.MonkeyPatch
):
    site, server, place = ours / "site-0", ours / "server", ours / "authority"
    shutil.rmtree(place)
    with monkeypatch.context() as then:
        set_clock(then, days=-400)
        make_authority(place, passphrase=None)
        for folder in (site, server):
            (folder / "authority.pem").unlink()
            sign(folder, place, days=390)
    for folder in (site, server):
        with pytest.raises(InputError, match="has expired"):
            load_credentials(folder)
    assert "client: " in (refused := shake_hands(server, site)) and "certificate has expired" in refused
    sign(server, place)
    assert "server: " in (refused := shake_hands(server, site)) and "certificate has expired" in refused
    key = (site / "site.key").read_bytes()
    sign(site, place)
    assert shake_hands(server, site) == "hello site-0"
    assert (site / "site.key").read_bytes() == key


openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def verify(place: Path, certificate: Path, purpose: str) -> str:
    lists = ("-CAfile", place / "authority.pem", "-CRLfile", place / "revoked.pem")
    command = ["openssl", "verify", "-x509_strict", "-crl_check", "-purpose", purpose, *lists, certificate]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (done.stdout.strip() == f"{certificate}: OK")
    return done.stdout + done.stderr


@openssl
def test_openssl_agrees_on_signatures_purposes_and_revocations(ours: Path):
    place, signed = ours / "authority", ours / "authority" / "signed"
    assert verify(place, signed / "site-0.pem", "sslclient").endswith("OK\n")
    assert verify(place, signed / "server.pem", "sslserver").endswith("OK\n")
    assert "unsuitable certificate purpose" in verify(place, signed / "site-0.pem", "sslserver")
    assert "unsuitable certificate purpose" in verify(place, signed / "server.pem", "sslclient")
    revoke(place, "site-0", passphrase=None)
    assert "certificate revoked" in verify(place, signed / "site-0.pem", "sslclient")
    assert verify(place, signed / "site-1.pem", "sslclient").endswith("OK\n")


@openssl
def test_openssl_opens_the_encrypted_key_with_its_passphrase_alone(tmp_path: Path):
    make_authority(tmp_path / "authority", passphrase=b"three words here")
    for words, opens in (("three words here", True), ("other words", False)):
        command = ["openssl", "pkey", "-in", tmp_path / "authority" / "authority.key", "-passin", "stdin", "-noout"]
        assert (subprocess.run(command, input=words, capture_output=True, text=True).returncode == 0) == opens


@openssl
def test_a_request_that_openssl_made_is_signed_like_ours(ours: Path):
    folder = ours / "site-5"
    folder.mkdir()
    command = ["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"]
    files = ["-subj", "/CN=site-5", "-keyout", folder / "site.key", "-out", folder / "site.csr"]
    subprocess.run([*command, *files], check=True, capture_output=True)
    sign(folder, ours / "authority")
    assert load_credentials(folder).client_id == 5
    assert shake_hands(ours / "server", folder) == "hello site-5"


def test_the_modules_load_no_torch():
    loaded = "import sys, parablock.deploy.authority, parablock.cli.deploy_keys; print('torch' in sys.modules)"
    with_torch = loaded.replace("import sys,", "import sys, torch,")
    for program, expected in ((loaded, "False"), (with_torch, "True")):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_a_missing_package_is_told_with_the_command_that_installs_it():
    hidden = "import sys; sys.modules['cryptography'] = None\nimport parablock.deploy.authority"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert "InputError: certificates need the package cryptography" in done.stderr
    assert 'pip install "parablock[deploy]"' in done.stderr


def test_keys_are_on_the_curve_that_is_promised(made: Path):
    for path in (made / "ours").rglob("*.key"):
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1"
