"""A site's signature: other sites of the federation believe it, and nobody else's."""

from __future__ import annotations

import shutil
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from masked_wires import MaskedWires
from message_sequences import masked_update
from parablock.deploy import certificates
from parablock.deploy.authority import make_all
from parablock.deploy.site_identity import CertificateIdentity
from parablock.errors import InputError
from parablock.privacy.identities import Identity
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.masking import Cohorts
from parablock.storage.release_ledger import ReleaseLedger
from parablock.wire.messages import Mark, from_bytes, to_bytes
from parablock.wire.sealing import Roster, pack_bytes, unpack_bytes
from parablock.wire.transport import Parcel


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_all(folder / "ours", 3, ["localhost"])
    make_all(folder / "theirs", 3, ["localhost"])
    return folder


def test_a_signature_is_believed_of_the_site_that_made_it_over_what_it_made_it_over(made: Path):
    zero, one = (CertificateIdentity(made / "ours" / f"site-{i}") for i in range(2))
    proof = zero.sign(b"keys")
    assert one.is_by(0, b"keys", proof)
    assert not one.is_by(1, b"keys", proof), "in another's name"
    assert not one.is_by(0, b"other keys", proof)
    stranger = CertificateIdentity(made / "theirs" / "site-0")
    assert not one.is_by(0, b"keys", stranger.sign(b"keys")), "of another federation"
    server = CertificateIdentity(made / "ours" / "server")
    assert not any(one.is_by(i, b"keys", server.sign(b"keys")) for i in range(2)), "the server is no site"
    for broken in (b"", proof[:100], proof[:-1], b"\xff\xff" + proof[2:], proof[:40] + b"\0" + proof[41:]):
        assert not one.is_by(0, b"keys", broken)


def with_a_name_of_no_type() -> bytes:
    """Return a certificate, DER, whose alternative name is an X.400 address."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    alternative = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, bytes([0x30, 4, 0xA3, 2, 5, 0]))
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, datetime.now(UTC), datetime.now(UTC))
    signed = builder.add_extension(alternative, critical=False).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.DER)


def test_a_certificate_of_any_bytes_is_not_believed_and_ends_nothing(made: Path):
    zero, one = (CertificateIdentity(made / "ours" / f"site-{i}") for i in range(2))
    proof = zero.sign(b"keys")
    end = 2 + int.from_bytes(proof[:2], "big")
    true, key_usage, basic = proof[2:end], b"\x06\x03\x55\x1d\x0f", b"\x06\x03\x55\x1d\x13"
    assert key_usage in true and basic in true
    malformed: dict[type[Exception], bytes] = {
        x509.InvalidVersion: true.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x01"),
        x509.DuplicateExtension: true.replace(key_usage, basic),
        x509.UnsupportedGeneralNameType: with_a_name_of_no_type(),
    }
    for error, certificate in malformed.items():
        with pytest.raises(error):
            list(x509.load_der_x509_certificate(certificate).extensions)
        assert not one.is_by(0, b"keys", len(certificate).to_bytes(2, "big") + certificate + proof[end:])
        pem = b"-----BEGIN CERTIFICATE-----\n" + b64encode(certificate) + b"\n-----END CERTIFICATE-----\n"
        with pytest.raises(InputError, match="exactly one certificate"):
            certificates.parse_certificate(pem, "a file")
    assert one.is_by(0, b"keys", len(true).to_bytes(2, "big") + true + proof[end:])


def test_certificates_that_end_in_mid_session_end_no_masked_run(made: Path, monkeypatch: pytest.MonkeyPatch):
    wires = town(made)
    begin(wires)
    later = certificates.now() + timedelta(days=4000)
    monkeypatch.setattr(certificates, "now", lambda: later)
    with pytest.raises(InputError, match="expired"):
        CertificateIdentity(made / "ours" / "site-0")  # who comes anew is not believed
    for client_id in range(3):
        wires.upload(client_id, masked_update(client_id, 0))
    while wires.collector.receive_until(1.0):
        pass
    assert not wires.collector.unfit(0, (0, 1, 2))
    assert len(wires.collector.masks_of(0, (0, 1, 2), 6)) == 6
    assert not wires.refused and not wires.told


def test_renewed_keys_count_and_half_installed_ones_do_not(made: Path, tmp_path: Path):
    keys = shutil.copytree(made / "ours" / "site-0", tmp_path / "site-0")
    signing = CertificateIdentity(keys)
    ours, theirs = (CertificateIdentity(made / whose / "site-1") for whose in ("ours", "theirs"))
    (keys / "site.pem").write_bytes((made / "theirs" / "site-0" / "site.pem").read_bytes())
    assert ours.is_by(0, b"keys", signing.sign(b"keys"))
    shutil.copytree(made / "theirs" / "site-0", keys, dirs_exist_ok=True)
    proof = signing.sign(b"keys")
    assert theirs.is_by(0, b"keys", proof) and not ours.is_by(0, b"keys", proof)


def town(made: Path, *, contexts: Sequence[str] = ("run",) * 4, server_believes: bool = False) -> MaskedWires:
    """Sites that sign, at a server that believes everybody, or nobody without a proof."""
    signing: list[Identity | None] = [CertificateIdentity(made / "ours" / f"site-{i}") for i in range(3)]
    signing.append(None if server_believes else CertificateIdentity(made / "ours" / "server"))
    return MaskedWires(3, {0: (0, 1, 2)}, identities=signing, contexts=contexts)


def begin(wires: MaskedWires) -> None:
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))


def sends(wires: MaskedWires, client_id: int) -> str:
    """Let a client send an update; return what comes of it."""
    *_, sent = wires.couriers[client_id].outgoing(Parcel(masked_update(client_id, 0), 0))
    return type(from_bytes(sent.message)).__name__


def with_keys_of_its_own(wires: MaskedWires) -> None:
    """Let the server pass on keys that it has made, in the place of client 2's."""
    own = MaskedClient(2, Cohorts(3, {0: (0, 1, 2)}), ReleaseLedger())
    keys = unpack_bytes(from_bytes(own.opening()[0].message).keys)
    passed = wires.send

    def send(client_id: int, parcel: Parcel) -> None:
        if isinstance(roster := from_bytes(parcel.message), Roster) and client_id != 2:
            true = unpack_bytes(roster.keys)
            roster = replace(roster, keys=pack_bytes(true[: 2 * len(keys)] + keys))
        passed(client_id, Parcel(to_bytes(roster), 0))

    wires.send = send  # type: ignore[method-assign]


def test_sites_mask_with_keys_that_are_signed_and_with_no_others(made: Path):
    honest = town(made)
    begin(honest)
    assert honest.collector.members == (0, 1, 2)
    assert sends(honest, 0) == "Update"
    deceived = town(made)
    with_keys_of_its_own(deceived)
    begin(deceived)  # which ends nobody's part
    assert [sorted(courier._public) for courier in deceived.couriers] == [[0, 1], [0, 1], [0, 1, 2]]
    assert sum("keys of client 2 that it has not signed; it is left out" in line for line in deceived.told) == 2
    assert deceived.refused == [(2, "misfit", "keys that 2 others do not believe")]
    assert deceived.collector.members == (0, 1)
    assert [sends(deceived, i) for i in (0, 1)] == ["Update", "Update"]
    unsigned = MaskedWires(3, {0: (0, 1, 2)})
    with_keys_of_its_own(unsigned)
    begin(unsigned)
    assert sorted(unsigned.couriers[0]._public) == [0, 1, 2], (
        "the hole that was: without certificates nobody notices"
    )


def test_keys_that_a_site_has_not_signed_leave_it_out_and_end_nobodys_part(made: Path):
    of_another_session = ("run now", "run before", "run now", "run now")
    wires = town(made, contexts=of_another_session)
    begin(wires)
    assert wires.collector.members == (0, 2)
    assert wires.refused == [(1, "misfit", "keys that it has not signed")]
    assert not wires.told, "the others never see these keys"
    assert [sends(wires, i) for i in (0, 2)] == ["Update", "Update"]
    loose = town(made, contexts=of_another_session, server_believes=True)
    begin(loose)  # the others notice themselves, and go on
    assert sum("keys of client 1 that it has not signed; it is left out" in line for line in loose.told) == 2
    assert loose.collector.members == (0, 2), "and the one whom the server alone believes is out"
    assert [sends(loose, i) for i in (0, 2)] == ["Update", "Update"]


def test_the_word_of_a_site_on_its_partners_cannot_be_another_s(made: Path):
    wires = town(made)
    begin(wires)
    for client_id in range(3):
        wires.upload(client_id, masked_update(client_id, 0))
    while wires.collector.receive_until(1.0):
        pass
    asked = wires.collector.question(0, (0, 1, 2))
    (answer,) = wires.couriers[1].incoming(Parcel(to_bytes(asked), 0))
    assert from_bytes(answer.message).shares.num_elements
    forged = bytearray(unpack_bytes(asked.proofs))
    forged[-1] ^= 1  # client 2's
    for lie in (replace(asked, proofs=pack_bytes(bytes(forged))), replace(asked, left_out=((), (), (0,)))):
        (answer,) = wires.couriers[1].incoming(Parcel(to_bytes(lie), 0))
        assert not from_bytes(answer.message).shares.num_elements
        assert "client 2" in wires.told[-1]
    false = replace(wires.couriers[2]._partners[0], proof=pack_bytes(bytes(forged)))
    fresh = town(made)
    begin(fresh)
    fresh._take(2, [Parcel(to_bytes(false), 0)])
    assert fresh.collector.receive_until(1.0) is None
    assert fresh.refused[0][0] == 2 and "has not signed" in fresh.refused[0][2]
    assert 2 in fresh.collector.unfit(0, (0, 1, 2))
