"""The identity of a site in secure aggregation: its signature vouches for its keys, and for whom it masks with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


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
