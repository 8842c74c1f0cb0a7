"""A message of each kind and format, and messages of our own making under a right checksum."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import torch

from parablock.wire import messages
from parablock.wire.codec import CHECKSUM, PREFIX, PROTOCOL_VERSION
from parablock.wire.quantize import FORMATS, pack


def every_message(num_elements: int) -> Iterator[bytes]:
    """Yield the messages of a run: those that carry values in each format, then the others."""
    for name in FORMATS:
        vector = pack(torch.linspace(-1, 1, num_elements), name)
        news = (messages.NewValue(1, 3, 0.5, "value", vector), messages.NewValue(0, 2, 1.0, "difference", vector))
        update = messages.Update(5, 2, 3, 120, 4, 1.25, 8, 0.5, 1, 3, vector)
        others = messages.RoundStart(5, 2, 8, 40, 3, news), messages.Finish(7, news)
        yield from map(messages.to_bytes, (update, *others, messages.Chunk(2, 7, "value", vector)))
    short = messages.Mark(8, stop=True), messages.Skip(4), messages.Join((3, -1), (4, 5)), messages.Welcome()
    yield from map(messages.to_bytes, short)


def parts_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the payload of a message."""
    (length,) = struct.unpack_from("<I", raw, 6)
    return json.loads(raw[PREFIX.size : PREFIX.size + length]), raw[PREFIX.size + length : -CHECKSUM.size]


def sealed(body: bytes) -> bytes:
    """Put a right checksum after anything."""
    return body + CHECKSUM.pack(zlib.crc32(body))


def forged(header: object, payload: bytes = b"", *, payload_length: int | None = None) -> bytes:
    """Make a message with a right checksum; a header that is no bytes is written as JSON."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(payload) if payload_length is None else payload_length
    return sealed(PREFIX.pack(b"PBLK", PROTOCOL_VERSION, len(head), length) + head + payload)
