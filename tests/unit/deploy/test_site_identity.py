"""A site's signature: other sites of the federation believe it, and nobody else's."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from masked_wires import MaskedWires
from parablock.deploy import site_identity
from parablock.deploy.authority import make_all
from parablock.deploy.site_identity import CertificateIdentity
from parablock.errors import CodecError
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


def test_a_signature_is_believed_of_the_site_that_made_it_over_what_it_made_it_over(
    made: Path, monkeypatch: pytest.MonkeyPatch
):
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
    later = site_identity.now() + timedelta(days=4000)
    monkeypatch.setattr(site_identity, "now", lambda: later)
    assert not one.is_by(0, b"keys", proof), "it has expired"


def town(made: Path, *, context: tuple[str, ...] = ("run",) * 3) -> MaskedWires:
    """Sites that sign their keys, at a server."""
    wires = MaskedWires(3, {0: (0, 1, 2)})
    known = Cohorts(3, {0: (0, 1, 2)})
    wires.couriers = [
        MaskedClient(
            i,
            known,
            ReleaseLedger(),
            identity=CertificateIdentity(made / "ours" / f"site-{i}"),
            context=context[i],
        )
        for i in range(3)
    ]
    wires._up.clear()
    for client_id, courier in enumerate(wires.couriers):
        wires._take(client_id, courier.opening())
    return wires


def begin(wires: MaskedWires) -> None:
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))


def test_sites_mask_with_keys_that_are_signed_and_with_no_others(made: Path):
    honest = town(made)
    begin(honest)
    assert honest.collector.members == (0, 1, 2)

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

    deceived = town(made)
    with_keys_of_its_own(deceived)
    with pytest.raises(CodecError, match="the keys of client 2 are not signed by it"):
        begin(deceived)
    unsigned = MaskedWires(3, {0: (0, 1, 2)})
    with_keys_of_its_own(unsigned)
    begin(unsigned)  # the hole that was: without certificates nobody notices


def test_keys_of_another_session_are_not_believed(made: Path):
    with pytest.raises(CodecError, match="the keys of client 1 are not signed by it"):
        begin(town(made, context=("run now", "run before", "run now")))
