"""Requests: what an end may ask for, and what the authority refuses to sign."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from parablock.deploy.authority import make_all, make_request, read_request, sign_request
from parablock.errors import InputError, StorageError

PEM = serialization.Encoding.PEM


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    make_all(folder, 2, ["fl.example.org"])
    return folder


def write_request(path: Path, *names: str, extensions: tuple[x509.ExtensionType, ...] = (), key=None) -> Path:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateSigningRequestBuilder(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    path.write_bytes(signed.public_bytes(PEM))
    return path


def san(*hosts: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])


def test_a_key_is_made_once_and_stays_for_this_user_alone(tmp_path: Path):
    request = make_request(tmp_path / "site", "site-3")
    key = tmp_path / "site" / "site.key"
    assert (request.name, key.stat().st_mode & 0o777, key.parent.stat().st_mode & 0o777) == (
        "site.csr",
        0o600,
        0o700,
    )
    assert b"PRIVATE" not in request.read_bytes()
    before, first = key.read_bytes(), read_request(request)
    again = read_request(make_request(tmp_path / "site", "site-3"))
    assert (key.read_bytes(), again.fingerprint, again.name) == (before, first.fingerprint, "site-3")
    assert read_request(make_request(tmp_path / "other", "site-3")).fingerprint != first.fingerprint


def test_a_server_asks_for_its_hosts_and_always_for_this_machine(tmp_path: Path):
    hosts = ["FL.example.org", "[2001:db8::1]", "10.0.0.7", "localhost", "my_host"]
    asked = read_request(make_request(tmp_path, "server", hosts))
    loopback = ("127.0.0.1", "::1")
    assert asked.hosts == ("fl.example.org", "2001:db8::1", "10.0.0.7", "localhost", "my_host", *loopback)
    assert read_request(make_request(tmp_path, "server")).hosts == ("localhost", *loopback)


def test_a_renewal_asks_for_the_hosts_of_before_unless_it_is_given_others(made: Path, tmp_path: Path):
    folder = shutil.copytree(made / "server", tmp_path / "server")
    assert "fl.example.org" in read_request(make_request(folder, "server")).hosts
    assert "fl.example.org" not in read_request(make_request(folder, "server", ["new.example.org"])).hosts


@pytest.mark.parametrize(
    "host",
    [
        *("", "fl.example.org:8000", "https://fl.example.org", "*.example.org", "fl example", "-a.org", "a-.org"),
        *("a..b", "0.0.0.0", "::", "bücher.example", "10.0.0.7/8", "10.0.0.256", "a" * 64, "a." * 130 + "org"),
    ],
)
def test_what_is_no_host_is_refused_before_a_key_is_made(tmp_path: Path, host: str):
    with pytest.raises(InputError, match="is not a host that a server can be reached by"):
        make_request(tmp_path / "server", "server", ["fl.example.org", host])
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize("name", ["site", "site-03", "client-1", "../site-1", "server-1"])
def test_a_name_that_is_none_is_refused_before_a_key_is_made(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="is not a name"):
        make_request(tmp_path / "site", name)
    assert not (tmp_path / "site").exists()


def test_a_folder_is_of_one_end_and_one_name(made: Path, tmp_path: Path):
    keys = shutil.copytree(made, tmp_path / "keys")
    with pytest.raises(InputError, match="belongs to site-0, and not to site-1"):
        make_request(keys / "site-0", "site-1")
    with pytest.raises(InputError, match="has the key of a server"):
        make_request(keys / "server", "site-1")
    with pytest.raises(InputError, match=r"was given hosts: a\.example\.org"):
        make_request(keys / "site-0", "site-0", ["a.example.org"])
    make_request(keys / "site-0", "site-0")
    make_request(tmp_path / "new", "site-4")
    make_request(tmp_path / "new", "site-5")  # a slip of the pen, before anybody has signed
    assert read_request(tmp_path / "new" / "site.csr").name == "site-5"


def test_a_key_that_others_can_read_makes_no_request(tmp_path: Path):
    make_request(tmp_path, "site-3").unlink()
    (tmp_path / "site.key").chmod(0o644)
    with pytest.raises(StorageError, match="has the mode 0644"):
        make_request(tmp_path, "site-3")
    assert not (tmp_path / "site.csr").exists()


@pytest.mark.parametrize(
    ("names", "extensions", "told"),
    [
        (["site-03"], (), "'site-03' is not a name"),
        (["site-3/../x"], (), "is not a name"),
        (["site-3", "site-4"], (), "is not a name"),
        ([], (), "is not a name"),
        (["site-3"], (san("fl.example.org"),), "for site-3 asks for extensions: SubjectAlternativeName"),
        (["site-3"], (x509.BasicConstraints(True, None),), "asks for extensions: BasicConstraints"),
        (["server"], (), "asks for extensions: none; it needs exactly its hosts"),
        (["server"], (san("a.org"), x509.BasicConstraints(True, None)), "SubjectAlternativeName, BasicConstraints"),
        (["server"], (san("*.example.org"),), r"'\*\.example\.org' is not a host"),
        (["server"], (x509.SubjectAlternativeName([x509.RFC822Name("a@b.org")]),), "'a@b.org' is not a host"),
    ],
)
def test_a_request_for_more_than_it_may_have_is_not_signed(
    made: Path, tmp_path: Path, names: list[str], extensions, told: str
):
    request = write_request(tmp_path / "any.csr", *names, extensions=extensions)
    with pytest.raises(InputError, match=told):
        sign_request(request, made / "authority", passphrase=None)
    assert not list(tmp_path.glob("*.pem"))


def test_the_same_requests_within_bounds_are_signed(made: Path, tmp_path: Path):
    keys = shutil.copytree(made, tmp_path / "keys")
    for name, extensions in (("site-3", ()), ("server", (san("a.org"),))):
        request = write_request(tmp_path / f"{name}.csr", name, extensions=extensions)
        assert sign_request(request, keys / "authority", passphrase=None, replace=True).name == f"{name}.pem"


def test_a_request_with_another_key_than_signed_it_is_refused(made: Path, tmp_path: Path):
    """The public key of one request stands in the other, whose signature does not cover it."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    public = [key.public_key().public_bytes(*form) for key in keys]
    request = write_request(tmp_path / "site.csr", "site-3", key=keys[0])
    assert read_request(request).name == "site-3"
    whole = x509.load_pem_x509_csr(request.read_bytes()).public_bytes(serialization.Encoding.DER)
    forged = x509.load_der_x509_csr(whole.replace(*public))
    assert forged.public_key() == keys[1].public_key()
    request.write_bytes(forged.public_bytes(PEM))
    with pytest.raises(InputError, match="is not signed by the key that it names"):
        sign_request(request, made / "authority", passphrase=None)


def test_keys_of_other_kinds_and_files_of_other_kinds_are_refused(made: Path, tmp_path: Path):
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        request = write_request(tmp_path / "site.csr", "site-3", key=key)
        with pytest.raises(InputError, match="not on the curve P-256"):
            sign_request(request, made / "authority", passphrase=None)
    for content in (b"", b"\xff\x00", (made / "site-0" / "site.pem").read_bytes(), request.read_bytes()[:200]):
        request.write_bytes(content)
        with pytest.raises(InputError, match="is not a certificate request in PEM"):
            sign_request(request, made / "authority", passphrase=None)
    with pytest.raises(StorageError, match="cannot be read"):
        sign_request(tmp_path / "gone.csr", made / "authority", passphrase=None)
