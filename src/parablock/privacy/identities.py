"""The identity of a site in secure aggregation: its signature vouches for its keys, and for whom it masks with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from parablock.privacy.protection import threshold_of


class Identity(Protocol):
    """Signs in the name of one client, and checks the signatures of all."""

    def sign(self, content: bytes) -> bytes:
        """Return a proof that this client has written the content."""

    def is_by(self, client_id: int, content: bytes, proof: bytes) -> bool:
        """Return whether a client has written the content."""


def signed_keys(context: str, client_id: int, keys: bytes) -> bytes:
    """Return what a client signs before the first round: its keys, for one session of one run alone."""
    return f"parablock keys\n{context}\n{client_id}\n".encode() + keys


def signed_partners(context: str, client_id: int, keys: bytes, round_index: int, left_out: Sequence[int]) -> bytes:
    """Return what a client signs with an update: whom of the round's cohort it does not mask with, and its keys."""
    said = f"parablock partners\n{context}\n{client_id}\n{round_index}\n{','.join(map(str, left_out))}\n"
    return said.encode() + keys


def is_proven(identity: Identity | None, client_id: int, content: bytes, proof: bytes) -> bool:
    """Return whether a client has signed; where clients have no certificates, everything counts as signed."""
    return identity is None or identity.is_by(client_id, content, proof)


def unbelieved(letters: Mapping[int, Mapping[int, bytes]], num_clients: int) -> dict[int, str]:
    """Return the clients that nobody can mask with, each with what is wrong with it.

    `letters` are those of each client to the others; an empty one is to a client whose keys it does not believe. If
    more than a third do not believe a client, it is out. If fewer do not, they may lie, and are out themselves.
    """
    faults = dict[int, str]()
    for member in sorted({member for written in letters.values() for member in written}):
        doubters = [client_id for client_id, written in letters.items() if written.get(member) == b""]
        if len(doubters) > num_clients - threshold_of(num_clients):
            faults[member] = f"keys that {len(doubters)} others do not believe"
        else:
            faults |= dict.fromkeys(doubters, f"no letter to client {member}, whose keys it does not believe")
    return faults
