"""The messages of secure aggregation, by which clients and server agree on masks.

Before the first round:

    client ── Advertise: its public keys ──► server ── Roster: the keys of all clients ──► client
    client ── Shares: a sealed letter for each other client ──► server ── Letters: those for it ──► client

In every round, when no further update will come:

    server ── Reveal(t): the clients whose updates have come ──► client
    client ── Revealed(t): its shares of the masks that are left in their sum ──► server
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args

import torch
from pydantic import AfterValidator, InstanceOf, StrictInt

from parablock.wire.quantize import Vector, pack


def _check_bytes(vector: Vector) -> Vector:
    if vector.format != "bytes":
        raise ValueError(f"it carries {vector.format}, not bytes")
    return vector


Bytes = Annotated[InstanceOf[Vector], AfterValidator(_check_bytes)]


@dataclass(frozen=True)
class Advertise:
    """A client's public keys: one for letters, then one for the masks of each of its rounds; 32 bytes each."""

    client_id: StrictInt
    keys: Bytes


@dataclass(frozen=True)
class Roster:
    """The `Advertise.keys` of all clients, one after another in order of client_id."""

    keys: Bytes


@dataclass(frozen=True)
class Shares:
    """A client's letters to all others, in order of client_id, and the length of each."""

    client_id: StrictInt
    letter_bytes: tuple[StrictInt, ...]
    letters: Bytes


@dataclass(frozen=True)
class Letters:
    """The letters of all others to a client, in order of client_id."""

    letter_bytes: tuple[StrictInt, ...]
    letters: Bytes


@dataclass(frozen=True)
class Reveal:
    """The server has the updates of these clients of round t, and accepts no others."""

    round_index: StrictInt
    clients: tuple[StrictInt, ...]


@dataclass(frozen=True)
class Revealed:
    """A client's share of one secret of each client of round t's cohort, in order, 33 bytes each."""

    round_index: StrictInt
    client_id: StrictInt
    shares: Bytes


Sealing = Advertise | Roster | Shares | Letters | Reveal | Revealed
SEALING_KINDS = frozenset(kind.__name__ for kind in get_args(Sealing))


def pack_bytes(content: bytes) -> Vector:
    """Return a vector of bytes."""
    return pack(torch.frombuffer(bytearray(content), dtype=torch.uint8), "bytes")


def unpack_bytes(vector: Vector) -> bytes:
    """Return the bytes of a vector."""
    return vector.raw.numpy().tobytes()
