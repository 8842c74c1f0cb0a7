"""Frames and requests of a session over Flower, as its tests use them."""

from __future__ import annotations

from parablock.engine.flower.exchange import Request
from parablock.engine.flower.stream import Frame

REQUEST = Request("run", "session", None, "train: {}", "abc")
OPENING = Request("run", "session", None, "", "")


def frame(message: int, content: bytes, offset: int = 0, size: int | None = None, checksum: int = 7) -> Frame:
    return Frame(message, offset, offset + len(content) if size is None else size, checksum, 0, content)
