"""The store of an open round's updates: in memory up to a budget, the rest in an unnamed file.

A client may be taken out until the round is committed, and then the other updates are folded again. So all updates
are kept until then: the first ones in memory, and the others in a file, which is read part by part. The file is
gone when it is closed, or when the process ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

import torch
from torch import Tensor

from parablock.storage.files import storage
from parablock.wire.quantize import Vector, payload_bytes, payload_ranges

Key = tuple[int, int]
"""client_id and chunk_index."""


class SamePart(Mapping[int, tuple[Tensor, int]]):
    """client_id → the same part of each update, with the update's examples; `read` reads it on access."""

    def __init__(self, read: Callable[[int], tuple[Tensor, int]], clients: Sequence[int]) -> None:
        self._read, self._clients = read, clients

    def __getitem__(self, client_id: int) -> tuple[Tensor, int]:
        return self._read(client_id)

    def __iter__(self) -> Iterator[int]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)


class WholeUpdate:
    """A whole update, read part by part by each iteration, which calls `parts`."""

    def __init__(self, parts: Callable[[], Iterator[Tensor]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Tensor]:
        return self._parts()


@dataclass(frozen=True)
class _Place:
    """A vector's place in the file."""

    format: str
    num_elements: int
    offset: int

    @property
    def num_bytes(self) -> int:
        return payload_bytes(self.num_elements, self.format)


class UpdateStore:
    """The vectors of one round.

    Args:
        folder: The folder of the file, which is made when it is needed; None: that of temporary files.
        budget_bytes: Most bytes in memory.
    """

    def __init__(self, folder: Path | None, budget_bytes: int) -> None:
        self._folder, self._room = folder or Path(gettempdir()), budget_bytes
        self._kept: dict[Key, Vector | _Place] = {}
        self._file: FileIO | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return self._end

    def put(self, client_id: int, chunk_index: int, vector: Vector) -> None:
        """Keep a vector; raise a StorageError if the disk has no room for it."""
        size = vector.raw.numel()
        if size <= self._room:
            self._room -= size
            self._kept[client_id, chunk_index] = vector
            return
        again = self._free.get(size)
        place = _Place(vector.format, vector.num_elements, again.pop() if again else self._end)
        self._write(vector, place.offset)
        self._end = max(self._end, place.offset + size)
        self._kept[client_id, chunk_index] = place

    def read(self, client_id: int, chunk_index: int, part: slice) -> Vector:
        """Return a part of a vector, from a multiple of `CHUNK_PIECE` on; raise a StorageError if that fails."""
        kept = self._kept[client_id, chunk_index]
        if isinstance(kept, Vector):
            return kept.part(part)
        ranges = payload_ranges(kept.num_elements, kept.format, part)
        raw = torch.empty(sum(place.stop - place.start for place in ranges), dtype=torch.uint8)
        into = raw.numpy().data
        assert self._file is not None
        with storage(self._folder):
            for place in ranges:
                size = place.stop - place.start
                if os.preadv(self._file.fileno(), [into[:size]], kept.offset + place.start) != size:
                    raise OSError("an update that was kept in a file there cannot be read back")
                into = into[size:]
        return Vector(kept.format, part.stop - part.start, raw)

    def drop(self, client_id: int) -> None:
        """Drop the vectors of a client; their places in the file are used again."""
        for key in [key for key in self._kept if key[0] == client_id]:
            kept = self._kept.pop(key)
            if isinstance(kept, Vector):
                self._room += kept.raw.numel()
            else:
                self._free.setdefault(kept.num_bytes, []).append(kept.offset)

    def close(self) -> None:
        """Drop all vectors, and the file."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, vector: Vector, offset: int) -> None:
        content = vector.raw.numpy().data
        with storage(self._folder):
            if self._file is None:
                self._file = TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115 -- `close` does
            while content:
                written = os.pwrite(self._file.fileno(), content, offset)
                content, offset = content[written:], offset + written
