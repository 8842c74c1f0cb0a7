"""The messages of secure aggregation: what clients and server say so that updates can be masked.

Before the first round:

    client ── Advertise: its public keys ──► server ── Roster: those of all ──► client
    client ── Shares: its secrets', one sealed letter for each other ──► server ── Letters: those for it ──► client

In every round, once all updates are there that will be:

    server ── Reveal(t): whose updates are there ──► client
    client ── Revealed(t): its shares of what hides their sum ──► server
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from parablock.wire.quantize import Vector, pack


@dataclass(frozen=True)
class Advertise:
    """A client's public keys: one for letters, then one for the masks of each of its rounds; 32 bytes each."""

    client_id: int
    keys: Vector


@dataclass(frozen=True)
class Roster:
    """Everybody's `Advertise.keys`, one after another in order of client_id."""

    keys: Vector


@dataclass(frozen=True)
class Shares:
    """A client's letters to all others, in order of client_id, all equally long, and how long they are."""

    client_id: int
    letter_bytes: tuple[int, ...]
    letters: Vector


@dataclass(frozen=True)
class Letters:
    """The letters of all others to a client, in order of client_id."""

    letter_bytes: tuple[int, ...]
    letters: Vector


@dataclass(frozen=True)
class Reveal:
    """The server has the updates of these clients of round t, and will have no others."""

    round_index: int
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Revealed:
    """A client's share of one secret of each client of round t's cohort, in order, 33 bytes each."""

    round_index: int
    client_id: int
    shares: Vector


Sealing = Advertise | Roster | Shares | Letters | Reveal | Revealed


def pack_bytes(content: bytes) -> Vector:
    """Make a vector of bytes."""
    return pack(torch.frombuffer(bytearray(content), dtype=torch.uint8), "bytes")


def unpack_bytes(vector: Vector) -> bytes:
    """Give the bytes of a vector."""
    return vector.raw.numpy().tobytes()


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, not int")
    return value


def _integers(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = fields[name]
    if not isinstance(values, list):
        raise TypeError(f"{name} is {values!r}, not list")
    return tuple(_integer({name: value}, name) for value in values)


def _one(vectors: list[Vector]) -> Vector:
    (vector,) = vectors
    if vector.format != "bytes":
        raise ValueError(f"it carries {vector.format}, not bytes")
    return vector


def _read_reveal(fields: Mapping[str, Any], vectors: list[Vector]) -> Reveal:
    if vectors:
        raise ValueError(f"it carries {len(vectors)} vectors")
    return Reveal(_integer(fields, "round_index"), _integers(fields, "clients"))


SEALING_READERS: dict[str, Callable[[Mapping[str, Any], list[Vector]], Sealing]] = {
    "Advertise": lambda fields, vectors: Advertise(_integer(fields, "client_id"), _one(vectors)),
    "Roster": lambda _, vectors: Roster(_one(vectors)),
    "Shares": lambda fields, vectors: Shares(
        _integer(fields, "client_id"), _integers(fields, "letter_bytes"), _one(vectors)
    ),
    "Letters": lambda fields, vectors: Letters(_integers(fields, "letter_bytes"), _one(vectors)),
    "Reveal": _read_reveal,
    "Revealed": lambda fields, vectors: Revealed(
        _integer(fields, "round_index"), _integer(fields, "client_id"), _one(vectors)
    ),
}
