"""The identity of a site in secure aggregation: its signature vouches for the keys that it advertises."""

from __future__ import annotations

from typing import Protocol

from parablock.errors import CodecError


class Identity(Protocol):
    """Signs in the name of one client, and checks the signatures of all."""

    def sign(self, content: bytes) -> bytes:
        """Return a proof that this client has written the content."""

    def is_by(self, client_id: int, content: bytes, proof: bytes) -> bool:
        """Return whether a client has written the content."""


def to_be_signed(context: str, client_id: int, keys: bytes) -> bytes:
    """Return what a client signs: its keys, for one session of one run alone."""
    return f"parablock keys\n{context}\n{client_id}\n".encode() + keys


def check_proof(identity: Identity | None, context: str, client_id: int, keys: bytes, proof: bytes) -> None:
    """Raise a CodecError unless a client has signed these keys; without an identity nothing is checked."""
    if identity is not None and not identity.is_by(client_id, to_be_signed(context, client_id, keys), proof):
        raise CodecError(
            f"the keys of client {client_id} are not signed by it",
            cause="The server passes on other keys than the client's, which would let it read updates.",
            remedy="Do not take part in the run of this server before that is cleared up.",
        )
