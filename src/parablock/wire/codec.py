"""The binary message format: header, vectors and checksum, all checked before use.

    offset  bytes  what
    0       4      magic, b"PBLK"
    4       2      protocol version, little endian
    6       4      H, length of the header, little endian
    10      8      P, length of the payload, little endian
    18      H      header: a JSON object in UTF-8; its `vectors` list describes the payload
    18+H    P      payload: the vectors one after another, little endian
    18+H+P  4      CRC-32 of all bytes before, little endian

`quantize` defines the bytes of a vector. A CRC-32 detects every flipped bit and every burst of up to 32 bits; it is
no protection against forgery, which needs TLS.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, StrictInt, TypeAdapter, ValidationError

from parablock.errors import CodecError
from parablock.wire.quantize import FORMATS, SPARSE, WORDS, Vector, payload_bytes

MAGIC = b"PBLK"
PROTOCOL_VERSION = 1
PREFIX = struct.Struct("<4sHIQ")
CHECKSUM = struct.Struct("<I")
MAX_HEADER_BYTES = 1 << 20
MAX_ELEMENTS = 1 << 48
"""Largest number of elements that a header may claim for a vector."""


@dataclass(frozen=True)
class _Description:
    """A header's description of one vector."""

    format: Annotated[str, Field(pattern=f"^({'|'.join((*FORMATS, *WORDS))}|{SPARSE}-[1-9][0-9]{{0,3}})$")]
    shape: tuple[Annotated[StrictInt, Field(ge=0, le=MAX_ELEMENTS)]]


_DESCRIPTIONS = TypeAdapter(list[_Description])


def encode(header: Mapping[str, Any], vectors: Sequence[Vector] = ()) -> bytes:
    """Encode a message; the header's fields are JSON-serializable, and its key `vectors` belongs to the codec."""
    described = [{"format": vector.format, "shape": [vector.num_elements]} for vector in vectors]
    head = json.dumps({**header, "vectors": described}, separators=(",", ":"), allow_nan=False).encode()
    raws = [vector.raw.contiguous().numpy().data for vector in vectors]
    prefix = PREFIX.pack(MAGIC, PROTOCOL_VERSION, len(head), sum(raw.nbytes for raw in raws))
    checksum = zlib.crc32(head, zlib.crc32(prefix))
    for raw in raws:
        checksum = zlib.crc32(raw, checksum)
    return b"".join((prefix, head, *raws, CHECKSUM.pack(checksum)))  # the only copy


def decode(message: bytes) -> tuple[dict[str, Any], list[Vector]]:
    """Decode a message; return the header without `vectors`, and the vectors.

    Raises:
        CodecError: The bytes are no message, of another protocol version, truncated, too long or altered, or the
            header does not describe the payload. Nothing is allocated before the lengths agree.
    """
    header_bytes, num_payload_bytes = _check_lengths(message)
    _check_sum(message)
    start = PREFIX.size + header_bytes
    header = _read_header(message[PREFIX.size : start])
    described = _read_descriptions(header.pop("vectors", None))
    sizes = [payload_bytes(entry.shape[0], entry.format) for entry in described]
    if sum(sizes) != num_payload_bytes:
        raise CodecError(
            f"a message describes {sum(sizes)} payload bytes and carries {num_payload_bytes}",
            cause="The header and the payload of the sender do not fit together.",
        )
    vectors = []
    for entry, size in zip(described, sizes, strict=True):
        raw = bytearray(memoryview(message)[start : start + size])
        tensor = torch.frombuffer(raw, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        vectors.append(Vector(entry.format, entry.shape[0], tensor))
        start += size
    return header, vectors


def header_of(message: bytes) -> dict[str, Any]:
    """Return a message's header, unchecked; empty if it cannot be read."""
    if len(message) < PREFIX.size:
        return {}
    end = PREFIX.size + min(PREFIX.unpack_from(message)[2], MAX_HEADER_BYTES)
    try:
        return _read_header(message[PREFIX.size : end])
    except CodecError:
        return {}


def _check_lengths(message: bytes) -> tuple[int, int]:
    if len(message) < PREFIX.size + CHECKSUM.size or message[:4] != MAGIC:
        raise CodecError(
            f"{len(message)} bytes that begin with {message[:4]!r} are not a ParaBlock message",
            cause="Another program talks to this port, or the message was cut at its start.",
        )
    _, version, header_bytes, num_payload_bytes = PREFIX.unpack_from(message)
    if version != PROTOCOL_VERSION:
        raise CodecError(
            f"a message of protocol version {version} reached a side that speaks version {PROTOCOL_VERSION}",
            cause="Client and server run different releases of ParaBlock.",
            remedy="Install the same release on both sides.",
        )
    expected = PREFIX.size + header_bytes + num_payload_bytes + CHECKSUM.size
    if len(message) != expected or header_bytes > MAX_HEADER_BYTES:
        raise CodecError(
            f"a message of {expected} bytes arrived with {len(message)}",
            cause="The message was cut, or joined with another one, on its way.",
            remedy="Send the message again.",
        )
    return header_bytes, num_payload_bytes


def _check_sum(message: bytes) -> None:
    (declared,) = CHECKSUM.unpack_from(message, len(message) - CHECKSUM.size)
    found = zlib.crc32(memoryview(message)[: -CHECKSUM.size])
    if found != declared:
        raise CodecError(
            f"a message of {len(message)} bytes has checksum {found:08x}, not {declared:08x} as it declares",
            cause="At least one bit changed on the way.",
            remedy="Send the message again.",
        )


def _read_header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"a message's header is not JSON: {error}", cause="The sender is not ParaBlock.") from None
    if not isinstance(header, dict):
        raise CodecError("a message's header is not a JSON object", cause="The sender is not ParaBlock.")
    return header


def _read_descriptions(described: Any) -> list[_Description]:
    try:
        return _DESCRIPTIONS.validate_python(described)
    except ValidationError:
        raise CodecError(
            f"a message describes its vectors as {described!r:.200}", cause="The sender is not ParaBlock."
        ) from None
