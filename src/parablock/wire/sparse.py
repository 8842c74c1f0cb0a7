"""Sparse payloads: of every cell of 4,096 elements the k largest, with a sign and one of two levels each.

Both levels are mean magnitudes, of the larger and of the smaller half of the k elements, as bfloat16. A place takes
12 bits, and sign and level one bit each. The last cell of a vector may be shorter, and keeps as large a part.

Layout, cell after cell: the higher level, the lower level, all places in ascending order (two in three bytes), all
codes (four in a byte; 1: negative, 2: the higher level), the first in the lowest bits.

Source: Sarfi et al., Communication Efficient LLM Pre-training with SparseLoCo, 2025 (arXiv 2508.15706).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

CELL = 1 << 12
"""Elements of a cell: as many as 12 bits can tell apart."""

ROWS = 1 << 8
"""Cells that are encoded at a time."""


@dataclass(frozen=True)
class Sparse:
    """A sparse format, by the number k of elements that a whole cell keeps."""

    kept: int

    def payload_bytes(self, num_elements: int) -> int:
        """Return the bytes of a vector."""
        whole, rest = divmod(num_elements, CELL)
        return whole * _record_bytes(self.kept) + (_record_bytes(self._kept_of(rest)) if rest else 0)

    def encode(self, values: Tensor) -> Tensor:
        """Return the payload of a vector, 1-D fp32: 1-D, uint8."""
        records = [self._encode_cells(cells) for _, cells in _by_length(values)]
        return torch.cat([record.flatten() for record in records]) if records else torch.empty(0, dtype=torch.uint8)

    def places(self, raw: Tensor, num_elements: int) -> Tensor:
        """Return the places of the elements that are kept, ascending: 1-D, int64."""
        found = []
        for first, length, cells in self._records(raw, num_elements):
            kept = self._kept_of(length)
            within = _unpack_places(cells[:, 4 : 4 + _place_bytes(kept)], kept)
            starts = torch.arange(first, first + CELL * len(cells), CELL).unsqueeze(1)
            found.append(within.add_(starts).flatten())
        return _joined(found, torch.int64)

    def values(self, raw: Tensor, num_elements: int) -> Tensor:
        """Return the values of the elements that are kept, in the order of their places: 1-D, fp32."""
        found = []
        for _, length, cells in self._records(raw, num_elements):
            kept = self._kept_of(length)
            levels = cells[:, :4].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
            of_codes = torch.stack([levels[:, 1], -levels[:, 1], levels[:, 0], -levels[:, 0]], 1)
            codes = _unpack_codes(cells[:, 4 + _place_bytes(kept) :], kept)
            found.append(of_codes.gather(1, codes).flatten())
        return _joined(found, torch.float32)

    def decode(self, raw: Tensor, num_elements: int) -> Tensor:
        """Return all values of a vector: 1-D, fp32, most of them 0."""
        dense = torch.zeros(num_elements)
        dense[self.places(raw, num_elements)] = self.values(raw, num_elements)
        return dense

    def _records(self, raw: Tensor, num_elements: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (first element, length of a cell, one record in a row) for the cells of each length."""
        first = begin = 0
        for rows, length in _shapes(num_elements):
            size = rows * _record_bytes(self._kept_of(length))
            yield first, length, raw[begin : begin + size].view(rows, -1)
            first, begin = first + rows * length, begin + size

    def _kept_of(self, length: int) -> int:
        return ceil(self.kept * length / CELL)

    def _encode_cells(self, cells: Tensor) -> Tensor:
        """Encode cells of one length, one in a row."""
        kept = self._kept_of(cells.shape[1])
        records = torch.empty(len(cells), _record_bytes(kept), dtype=torch.uint8)
        for first in range(0, len(cells), ROWS):
            rows = slice(first, first + ROWS)
            magnitudes, places = cells[rows].abs().topk(kept, dim=1)
            half = ceil(kept / 2)
            higher = magnitudes[:, :half].mean(1)
            lower = magnitudes[:, half:].mean(1) if half < kept else higher
            codes = (torch.arange(kept) < half).long() * 2 + (cells[rows].gather(1, places) < 0).long()
            places, order = places.sort(dim=1)
            records[rows, :4] = torch.stack([higher, lower], 1).bfloat16().view(torch.uint8)
            records[rows, 4 : 4 + _place_bytes(kept)] = _pack_places(places)
            records[rows, 4 + _place_bytes(kept) :] = _pack_codes(codes.gather(1, order))
        return records


def _shapes(num_elements: int) -> Iterator[tuple[int, int]]:
    """Yield (number of cells, their length): the whole cells, and the rest."""
    whole, rest = divmod(num_elements, CELL)
    yield from ((rows, length) for rows, length in ((whole, CELL), (1, rest)) if rows and length)


def _by_length(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the cells of each length, one in a row."""
    first = 0
    for rows, length in _shapes(values.numel()):
        yield length, values[first : first + rows * length].view(rows, length)
        first += rows * length


def _place_bytes(kept: int) -> int:
    return ceil(kept * 12 / 8)


def _record_bytes(kept: int) -> int:
    return 4 + _place_bytes(kept) + ceil(kept / 4)


def _pack_places(places: Tensor) -> Tensor:
    """Pack places of 12 bits, two in three bytes: (rows, k) → (rows, bytes), uint8."""
    odd = places.shape[1] % 2
    pairs = torch.nn.functional.pad(places, (0, odd)).view(len(places), -1, 2)
    low, high = pairs[..., 0], pairs[..., 1]
    three = torch.stack([low & 0xFF, (low >> 8) | ((high & 0xF) << 4), high >> 4], dim=2)
    return three.to(torch.uint8).flatten(1)[:, : _place_bytes(places.shape[1])]


def _unpack_places(packed: Tensor, kept: int) -> Tensor:
    """Unpack places: (rows, bytes), uint8 → (rows, k), int64."""
    three = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3)).view(len(packed), -1, 3).int()
    places = torch.empty(len(packed), 2 * three.shape[1], dtype=torch.int64)
    places[:, 0::2] = (three[..., 1] & 0xF).mul_(256).add_(three[..., 0])
    places[:, 1::2] = (three[..., 2] * 16).add_(three[..., 1] >> 4)
    return places[:, :kept]


def _pack_codes(codes: Tensor) -> Tensor:
    """Pack codes of two bits, four in a byte: (rows, k) → (rows, bytes), uint8."""
    lanes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).view(len(codes), -1, 4)
    return (lanes << torch.arange(0, 8, 2)).sum(2).to(torch.uint8)


def _unpack_codes(packed: Tensor, kept: int) -> Tensor:
    """Unpack codes: (rows, bytes), uint8 → (rows, k), int64."""
    return _CODES[packed.int()].flatten(1)[:, :kept]


_CODES = torch.arange(1 << 8).unsqueeze(1) >> torch.arange(0, 8, 2) & 3
"""The four codes in each byte."""


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.empty(0, dtype=dtype)
