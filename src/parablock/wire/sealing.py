"""The messages of secure aggregation, by which clients and server agree on masks.

Before the first round, once each; the members are the clients that have sent what the server has to pass on:

    client ── Advertise: its public keys, signed ──► server ── Roster: those of all members ──► client
    client ── Shares: a sealed letter for each other member ──► server ── Letters: those for it ──► client

With every update:

    client ── Partners(t): whom of the cohort it does not mask with, signed ──► server

In every round, when no further update will come:

    server ── Reveal(t): the clients whose updates have come, with what they have said of their partners ──► client
    client ── Revealed(t): its shares of the masks that are left in their sum, or nothing: it refuses ──► server

After a round that a client has made void by secrets that do not fit:

    server ── LeaveOut: mask with that client no more ──► client
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, get_args

import torch
from pydantic import AfterValidator, Field, InstanceOf, StrictInt

from parablock.errors import CodecError
from parablock.wire.quantize import Vector, pack


def _check_bytes(vector: Vector) -> Vector:
    if vector.format != "bytes":
        raise ValueError(f"it carries {vector.format}, not bytes")
    return vector


def _check_ascending(clients: tuple[int, ...]) -> tuple[int, ...]:
    if list(clients) != sorted(set(clients)):
        raise ValueError(f"clients {clients!r:.100} are not in ascending order, each once")
    return clients


Bytes = Annotated[InstanceOf[Vector], AfterValidator(_check_bytes)]
Number = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
Clients = Annotated[tuple[Number, ...], AfterValidator(_check_ascending)]


@dataclass(frozen=True)
class Advertise:
    """A client's public keys: one for letters, then one for the masks of each of its rounds; 32 bytes each.

    `proof` is the client's signature; empty where clients have no certificates.
    """

    client_id: Number
    keys: Bytes
    proof: Bytes


@dataclass(frozen=True)
class Roster:
    """`Advertise.keys` and `Advertise.proof` of each member, one after another, and their lengths."""

    clients: Clients
    key_bytes: tuple[Number, ...]
    proof_bytes: tuple[Number, ...]
    keys: Bytes
    proofs: Bytes


@dataclass(frozen=True)
class Shares:
    """A client's letters to all other members, in order of client_id, and the length of each.

    A letter of length 0 is none: the client does not believe that member's proof.
    `commitments` are the hashes of its secrets and of every share; see `masking.commit`.
    """

    client_id: Number
    letter_bytes: tuple[Number, ...]
    letters: Bytes
    commitments: Bytes


@dataclass(frozen=True)
class Letters:
    """The letters of other members to a client, in order of client_id, with the commitments to their content."""

    clients: Clients
    letter_bytes: tuple[Number, ...]
    letters: Bytes
    commitments: Bytes


@dataclass(frozen=True)
class Partners:
    """The members of round t's cohort that a client does not mask with, and its signature."""

    round_index: Number
    client_id: Number
    left_out: Clients
    proof: Bytes


@dataclass(frozen=True)
class LeaveOut:
    """Nobody masks with this client any more."""

    client_id: Number


def pack_bytes(content: bytes) -> Vector:
    """Return a vector of bytes."""
    return pack(torch.frombuffer(bytearray(content), dtype=torch.uint8), "bytes") if content else _NOTHING


_NOTHING = pack(torch.empty(0, dtype=torch.uint8), "bytes")


@dataclass(frozen=True)
class Reveal:
    """The server has the updates of these clients of round t, and accepts no others.

    `left_out` and `proofs` are those of each client's `Partners`, in the same order.
    """

    round_index: Number
    clients: Clients
    left_out: tuple[Clients, ...]
    proof_bytes: tuple[Number, ...]
    proofs: Bytes


@dataclass(frozen=True)
class Revealed:
    """A client's share of one secret of each client of round t's cohort, in order, 33 bytes each; or nothing."""

    round_index: Number
    client_id: Number
    shares: Bytes


Sealing = Advertise | Roster | Shares | Letters | Partners | LeaveOut | Reveal | Revealed
SEALING_KINDS = frozenset(kind.__name__ for kind in get_args(Sealing))


def unpack_bytes(vector: Vector) -> bytes:
    """Return the bytes of a vector."""
    return vector.raw.numpy().tobytes()


def cut(vector: Vector, lengths: Sequence[int]) -> list[bytes]:
    """Cut the bytes of a vector into pieces of these lengths.

    Raises:
        CodecError: They are not as long as the pieces together.
    """
    content = unpack_bytes(vector)
    if sum(lengths) != len(content):
        raise CodecError(f"{len(content)} bytes where pieces of {sum(lengths)} together are due")
    return [content[begin:end] for begin, end in pairwise(accumulate(lengths, initial=0))]
