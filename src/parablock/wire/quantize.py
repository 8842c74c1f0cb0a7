r"""Quantization and payload formats: a flat vector as bytes, exactly or with few bits.

| format | bytes of n elements | error |
|---|---|---|
| float32 | 4·n | none |
| bfloat16 | 2·n | 8 significant bits |
| int8 | n + 2·⌈n/256⌉ | half a step of max\|group\|/127 (nearest) |
| int4 | ⌈n/2⌉ + 2·⌈n/64⌉ | half a step of max\|group\|/7 |
| int2 | ⌈n/4⌉ + 2·⌈n/64⌉ | half a step of max\|group\|/1 |
| sparse2-k | `sparse.py`: of 4,096 elements the k largest, with two bits | all but the largest |

A quantized vector is cut into groups. Each group has a scale, the largest magnitude over the largest level, rounded
up to bfloat16 so that no element is clipped. Levels are symmetric around 0.
`nearest` rounds to the nearest level. `stochastic` rounds up or down at random, so that the expected value is the
element itself (to one part in 2^16 of a step) and the mean over clients is unbiased.

Layout: all scales, then all codes (level + largest level), 8/bits codes in a byte, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
import torch
from torch import Tensor

from parablock.seeding import generator_for
from parablock.wire.sparse import CELL, Sparse


@dataclass(frozen=True)
class Quantized:
    """A quantized format: the bits of a level, and the number of elements that share a scale."""

    bits: int
    group: int

    @property
    def levels(self) -> int:
        """The largest level L; the levels are −L … L."""
        return int(2 ** (self.bits - 1) - 1)


FLOATS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZED = {"int8": Quantized(8, 256), "int4": Quantized(4, 64), "int2": Quantized(2, 64)}
WORDS: dict[str, torch.dtype] = {"word32": torch.int32, "bytes": torch.uint8}
"""Fixed-point words of secure aggregation, and raw bytes: keys and shares."""
FORMATS = (*FLOATS, *QUANTIZED)
"""The values of `wire.format` that have no number."""
SPARSE = "sparse2"
"""The value of `wire.format` whose payloads are called `sparse2-k`, by the elements that a cell keeps."""
DENSER_DOWN = 3
"""Elements of a cell that a sparse difference keeps on its way down, as a multiple of those on the way up."""
CHUNK_PIECE = 1 << 14
"""Chunks are multiples of this many elements, so that no group and no norm depends on the cuts."""
PIECE = 1 << 17
"""Elements quantized at a time; small enough for the cache, and a multiple of every group."""


@dataclass(frozen=True, eq=False)
class Vector:
    """An encoded flat vector.

    Attributes:
        format: One of `FORMATS` or `WORDS`.
        num_elements: Number of elements.
        raw: The payload: 1-D uint8, `payload_bytes(num_elements, format)` long.
    """

    format: str
    num_elements: int
    raw: Tensor

    @property
    def values(self) -> Tensor:
        """The decoded values: 1-D; bfloat16 for that format, int32 and uint8 for `WORDS`, else float32."""
        if self.format in FLOATS:
            return self.raw.view(FLOATS[self.format])
        if self.format in WORDS:
            return self.raw.view(WORDS[self.format])
        if (sparse := sparse_format(self.format)) is not None:
            return sparse.decode(self.raw, self.num_elements)
        return _dequantize(self.raw, self.num_elements, QUANTIZED[self.format])

    @property
    def places(self) -> Tensor:
        """The places of the elements that a sparse payload keeps, ascending: 1-D, int64."""
        sparse = sparse_format(self.format)
        assert sparse is not None
        return sparse.places(self.raw, self.num_elements)

    @property
    def stored(self) -> Tensor:
        """The values that the payload holds: 1-D; all but the zeros of a sparse one."""
        sparse = sparse_format(self.format)
        return self.values if sparse is None else sparse.values(self.raw, self.num_elements)

    def part(self, part: slice) -> Vector:
        """Return some of the elements, bitwise as in the whole; the first is at a multiple of `CHUNK_PIECE`."""
        raws = [self.raw[place] for place in payload_ranges(self.num_elements, self.format, part)]
        return Vector(self.format, part.stop - part.start, raws[0] if len(raws) == 1 else torch.cat(raws))


@dataclass(frozen=True)
class Encoding:
    """The encoding of vectors; names as in the section `wire` of the configuration.

    Attributes:
        format: Payload format.
        rounding: stochastic | nearest, for the quantized formats.
        error_feedback: Whether a block's rounding error is added to its next update.
        residual_decay: The part of that error that is added.
        seed: The run's seed; draws depend on (seed, round, client).
        chunk_bytes: Approximate payload of a chunk; None: no chunks.
    """

    format: str
    rounding: str = "nearest"
    error_feedback: bool = False
    seed: int = 0
    chunk_bytes: int | None = None
    residual_decay: float = 1.0

    def noise(self, round_index: int, client_id: int) -> np.random.Generator | None:
        """Return the generator that rounds one vector, None for nearest; the server is client −1."""
        if self.rounding == "nearest":
            return None
        if self.rounding != "stochastic":
            raise ValueError(f"rounding {self.rounding!r} is none of nearest, stochastic")
        return generator_for(self.seed, "rounding", round_index, client_id)

    def payload_bytes(self, num_elements: int) -> int:
        """Return the bytes of a vector."""
        return payload_bytes(num_elements, self.format)

    def cut(self, num_elements: int) -> list[slice]:
        """Cut a vector into chunks of about `chunk_bytes`: whole pieces and a rest; at least one chunk."""
        if self.chunk_bytes is None or not num_elements:
            return [slice(0, num_elements)]
        size = max(1, int(self.chunk_bytes / bytes_per_element(self.format)) // CHUNK_PIECE) * CHUNK_PIECE
        return [slice(k, min(k + size, num_elements)) for k in range(0, num_elements, size)]


def payload_bytes(num_elements: int, payload_format: str) -> int:
    """Return the bytes of a vector in a format."""
    exact = FLOATS | WORDS
    if payload_format in exact:
        return num_elements * exact[payload_format].itemsize
    if (sparse := sparse_format(payload_format)) is not None:
        return sparse.payload_bytes(num_elements)
    kind = QUANTIZED[payload_format]
    return ceil(num_elements * kind.bits / 8) + 2 * ceil(num_elements / kind.group)


def payload_ranges(num_elements: int, payload_format: str, part: slice) -> list[slice]:
    """Return the byte ranges of some elements in a vector's payload; the first at a multiple of `CHUNK_PIECE`."""
    exact = FLOATS | WORDS
    if payload_format in exact:
        size = exact[payload_format].itemsize
        return [slice(part.start * size, part.stop * size)]
    if (sparse := sparse_format(payload_format)) is not None:
        whole = part.start // CELL * sparse.payload_bytes(CELL)
        return [slice(whole, whole + sparse.payload_bytes(part.stop - part.start))]
    kind = QUANTIZED[payload_format]
    levels = 2 * ceil(num_elements / kind.group)
    return [
        slice(2 * (part.start // kind.group), 2 * ceil(part.stop / kind.group)),
        slice(levels + part.start * kind.bits // 8, levels + ceil(part.stop * kind.bits / 8)),
    ]


def pack(values: Tensor, payload_format: str, noise: np.random.Generator | None = None) -> Vector:
    """Encode a 1-D vector of finite values; `noise` draws its stochastic rounding, and None rounds to nearest."""
    flat = values.detach().cpu()
    exact = FLOATS | WORDS
    if payload_format in exact:
        raw = flat.to(exact[payload_format]).contiguous().view(torch.uint8)
    elif (sparse := sparse_format(payload_format)) is not None:
        raw = sparse.encode(flat.float())
    else:
        raw = _quantize(flat.float(), QUANTIZED[payload_format], noise)
    return Vector(payload_format, flat.numel(), raw)


def join_chunks(chunks: Sequence[Vector]) -> Tensor:
    """Return the decoded values of a vector in chunks: 1-D, fp32."""
    values = [chunk.values.float() for chunk in chunks]
    return values[0] if len(values) == 1 else torch.cat(values)


@cache
def sparse_format(payload_format: str) -> Sparse | None:
    """Return the sparse format of a name such as `sparse2-82`; None for any other name."""
    name, dash, kept = payload_format.partition("-")
    return Sparse(int(kept)) if name == SPARSE and dash else None


def payload_format(wire_format: str, density: float) -> str:
    """Return the name of the payloads of a `wire.format`, of which `density` is that of a sparse one."""
    return f"{SPARSE}-{max(1, round(density * CELL))}" if wire_format == SPARSE else wire_format


def downlink_format(payload_format: str) -> str:
    """Return the format in which new values go down where updates come up in this one: a sparse one is denser.

    The mean of sparse updates has up to as many more elements that are not 0 as there are clients. What the server
    keeps back reaches nobody until it is among the largest, so that clients would train on what is long outdated.
    """
    sparse = sparse_format(payload_format)
    return payload_format if sparse is None else f"{SPARSE}-{min(DENSER_DOWN * sparse.kept, CELL)}"


def bytes_per_element(payload_format: str) -> float:
    """Return the bytes of an element, without the scales."""
    if (sparse := sparse_format(payload_format)) is not None:
        return sparse.payload_bytes(CELL) / CELL
    return FLOATS[payload_format].itemsize if payload_format in FLOATS else QUANTIZED[payload_format].bits / 8


def _quantize(values: Tensor, kind: Quantized, noise: np.random.Generator | None) -> Tensor:
    n = values.numel()
    num_groups = ceil(n / kind.group)
    raw = torch.empty(2 * num_groups + ceil(n * kind.bits / 8), dtype=torch.uint8)
    scales, packed = raw[: 2 * num_groups].view(torch.int16), raw[2 * num_groups :]
    per_byte = 8 // kind.bits
    for first in range(0, n, PIECE):
        piece = values[first : first + PIECE]
        if piece.numel() % kind.group:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % kind.group))
        groups = piece.view(-1, kind.group)
        scale_bits = _bfloat16_at_least(groups.abs().amax(dim=1) / kind.levels)
        scales[first // kind.group : first // kind.group + len(scale_bits)] = scale_bits
        scale = _from_bfloat16(scale_bits)
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros(())).unsqueeze(1)
        levels = torch.addcmul(_offsets(groups, kind, noise), groups, inverse)
        # clamp: float32 may leave the range by a rounding error; truncation is floor for positive numbers
        codes = levels.clamp_(0, 2 * kind.levels).to(torch.uint8).view(-1)
        begin, end = first // per_byte, min(ceil(n / per_byte), (first + PIECE) // per_byte)
        packed[begin:end] = _pack_codes(codes, kind)[: end - begin]
    return raw


def _offsets(groups: Tensor, kind: Quantized, noise: np.random.Generator | None) -> Tensor:
    """Return the offsets before truncation: the largest level, plus ½ or a uniform draw of 16 bits."""
    if noise is None:
        return torch.full((), kind.levels + 0.5).expand_as(groups)
    words = noise.integers(0, 1 << 64, size=groups.numel() // 4, dtype=np.uint64)
    draws = torch.from_numpy(words.view(np.int16)).view_as(groups)  # −2^15 … 2^15 − 1
    return draws.to(torch.float32).mul_(2.0**-16).add_(kind.levels + 0.5 + 2.0**-17)


def _pack_codes(codes: Tensor, kind: Quantized) -> Tensor:
    if kind.bits == 8:
        return codes
    lanes = codes.view(-1, 8 // kind.bits)
    packed = lanes[:, 0].clone()
    for lane in range(1, 8 // kind.bits):
        packed.bitwise_or_(lanes[:, lane] << (lane * kind.bits))
    return packed


def _dequantize(raw: Tensor, n: int, kind: Quantized) -> Tensor:
    num_groups = ceil(n / kind.group)
    scale = _from_bfloat16(raw[: 2 * num_groups].view(torch.int16))
    packed = raw[2 * num_groups :]
    values = torch.empty(num_groups * kind.group)
    per_byte, mask = 8 // kind.bits, (1 << kind.bits) - 1
    for first in range(0, values.numel(), PIECE):
        target = values[first : first + PIECE]
        codes = packed[first // per_byte : (first + PIECE) // per_byte]
        lanes = target.view(-1, per_byte)[: len(codes)]
        for lane in range(per_byte):
            lanes[:, lane] = codes if kind.bits == 8 else (codes >> (lane * kind.bits)) & mask
        groups = target.view(-1, kind.group)
        groups.sub_(kind.levels).mul_(scale[first // kind.group : first // kind.group + len(groups)].unsqueeze(1))
    return values[:n]


def _bfloat16_at_least(scale: Tensor) -> Tensor:
    """Round non-negative fp32 up to bfloat16; return the bits as int16."""
    return ((scale.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)


def _from_bfloat16(bits: Tensor) -> Tensor:
    return (bits.to(torch.int32) << 16).view(torch.float32)
