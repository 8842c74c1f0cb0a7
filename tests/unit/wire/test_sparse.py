"""Sparse payloads: what they keep, how long they are, and that a cut vector is the whole one."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from torch import Tensor

from parablock.wire.quantize import (
    CHUNK_PIECE,
    Encoding,
    Vector,
    bytes_per_element,
    downlink_format,
    pack,
    payload_bytes,
    payload_format,
)
from parablock.wire.sparse import CELL, Sparse

LENGTHS = [1, 2, 3, 64, CELL - 1, CELL, CELL + 1, 3 * CELL + 77, CHUNK_PIECE + 5]


def vector(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) ** 3


def expected(values: Tensor, kept: int) -> Tensor:
    """Keep the largest of each cell, one element at a time."""
    result = torch.zeros_like(values)
    for first in range(0, len(values), CELL):
        cell = values[first : first + CELL]
        count = ceil(kept * len(cell) / CELL)
        order = sorted(range(len(cell)), key=lambda place: -abs(float(cell[place])))[:count]
        half = ceil(count / 2)
        for places in (order[:half], order[half:]):
            if places:
                level = float(cell[places].abs().mean().bfloat16())
                for place in places:
                    result[first + place] = level if cell[place] > 0 else -level
    return result


@pytest.mark.parametrize("size", LENGTHS)
@pytest.mark.parametrize("kept", [20, 81, 82, 205])
def test_the_largest_of_each_cell_travel_with_their_sign_and_one_of_two_levels(size: int, kept: int) -> None:
    values = vector(size)
    packed = pack(values, f"sparse2-{kept}")
    assert packed.raw.numel() == payload_bytes(size, f"sparse2-{kept}")
    assert torch.allclose(packed.values, expected(values, kept), rtol=2**-7)
    assert (
        int((packed.values != 0).sum())
        == len(packed.stored)
        == sum(ceil(kept * min(CELL, size - first) / CELL) for first in range(0, size, CELL))
    )
    places, entries = packed.places, packed.stored
    assert torch.equal(packed.values[places], entries) and bool((places.diff() > 0).all())


def test_two_in_a_hundred_take_less_than_a_hundredth_of_float32() -> None:
    name = payload_format("sparse2", 0.02)
    assert name == "sparse2-82" and payload_format("int4", 0.02) == "int4"
    # a cell: 82 places of 12 bits (123 bytes), 82 codes of 2 bits (21), two levels of two bytes (4)
    assert payload_bytes(CELL, name) == 148 == Sparse(82).payload_bytes(CELL)
    assert payload_bytes(10**6, name) / payload_bytes(10**6, "float32") == pytest.approx(0.00905, abs=1e-4)
    assert bytes_per_element(name) == 148 / 4096 > bytes_per_element(payload_format("sparse2", 0.005))


@pytest.mark.parametrize("size", [CHUNK_PIECE, 3 * CHUNK_PIECE + 99])
def test_a_part_and_a_chunk_are_bitwise_those_of_the_whole(size: int) -> None:
    values, name = vector(size), "sparse2-82"
    whole = pack(values, name)
    for first in range(0, size, CHUNK_PIECE):
        part = slice(first, min(first + CHUNK_PIECE, size))
        assert torch.equal(whole.part(part).values, whole.values[part])
        assert torch.equal(pack(values[part], name).raw, whole.part(part).raw)
    assert not torch.equal(pack(values.flip(0), name).values, whole.values)
    assert len(Encoding(name, chunk_bytes=1024).cut(size)) == ceil(size / CHUNK_PIECE)


def test_a_vector_of_zeros_and_one_of_ties_survive() -> None:
    assert not pack(torch.zeros(CELL + 3), "sparse2-82").values.any()
    ties = pack(-torch.ones(CELL), "sparse2-82").values
    assert set(ties.tolist()) == {0.0, -1.0} and int(ties.sum()) == -82


def test_what_is_kept_back_travels_in_later_rounds() -> None:
    wanted, sent, residual = vector(CELL), torch.zeros(CELL), torch.zeros(CELL)
    errors = []
    for _ in range(200):
        packed = pack(wanted + residual, "sparse2-82").values
        residual, sent = wanted + residual - packed, sent + packed
        errors.append(float((sent / (len(errors) + 1) - wanted).norm() / wanted.norm()))
    assert errors[-1] < 0.1 < 0.3 < errors[0]
    without = pack(wanted, "sparse2-82").values
    assert float((without - wanted).norm() / wanted.norm()) > 0.3


def test_a_sparse_vector_of_no_elements_is_empty() -> None:
    assert Vector("sparse2-82", 0, torch.empty(0, dtype=torch.uint8)).values.numel() == 0
    assert payload_bytes(0, "sparse2-82") == pack(torch.empty(0), "sparse2-82").raw.numel() == 0


def test_what_goes_down_is_denser_than_what_comes_up():
    assert downlink_format("sparse2-82") == "sparse2-246"  # 3 · 2% of 4,096
    assert downlink_format("sparse2-2000") == f"sparse2-{CELL}"
    assert [downlink_format(name) for name in ("int4", "float32")] == ["int4", "float32"]
    values = vector(CELL)
    assert torch.equal(pack(values, downlink_format("sparse2-2000")).values != 0, values != 0)
