from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock.wire.quantize import PIECE, QUANTIZED, Encoding, bytes_per_element, pack, payload_bytes

FORMATS = list(QUANTIZED)


def vector(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 1e-3


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_sizes_follow_the_documented_formula():
    # n = 1000: int8 1000 + 2·4; int4 500 + 2·16; int2 250 + 2·16
    assert [payload_bytes(1000, name) for name in FORMATS] == [1008, 532, 282]
    assert [payload_bytes(1000, name) for name in ("float32", "bfloat16")] == [4000, 2000]
    # a large int4 update takes at most 0.14 of its float32 form
    assert payload_bytes(10**6, "int4") / payload_bytes(10**6, "float32") == pytest.approx(0.1328, abs=1e-4)
    assert [bytes_per_element(name) for name in ("float32", "bfloat16", *FORMATS)] == [4, 2, 1, 0.5, 0.25]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 255, 257, 1000, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 77])
@pytest.mark.parametrize("stochastic", [False, True])
def test_any_length_survives_within_one_step(name, n, stochastic):
    values = vector(n)
    packed = pack(values, name, draws() if stochastic else None)
    assert packed.raw.numel() == payload_bytes(n, name)
    seen = packed.values
    assert seen.shape == values.shape
    kind = QUANTIZED[name]
    padded = torch.nn.functional.pad(values, (0, -n % kind.group)).view(-1, kind.group)
    step = (padded.abs().amax(1) / kind.levels).repeat_interleave(kind.group)[:n] * (1 + 2**-7)
    assert ((seen - values).abs() <= step * (1.0 if stochastic else 0.5) + 1e-9).all()


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_equals_an_independent_formula(name):
    kind, values = QUANTIZED[name], vector(10 * 256)
    groups = values.view(-1, kind.group).double()
    scale = (groups.abs().amax(1, keepdim=True) / kind.levels).float()
    bits = (scale.view(torch.int32) >> 16) << 16  # bfloat16, rounded down …
    up = torch.where(bits.view(torch.float32) < scale, bits + (1 << 16), bits).view(torch.float32)  # … then up
    expected = (torch.floor(groups / up + 0.5) * up).float().view(-1)
    assert torch.allclose(pack(values, name).values, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(pack(values, name, draws()).values, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_unbiased_and_nearest_is_not(name):
    values = torch.full((64 * 4,), 0.3)
    values[::64] = 1.0  # the largest of each group: the scale is 1/levels (the next bfloat16 above it)
    values[::256] = 1.0
    generator = draws()
    mean = sum(pack(values, name, generator).values.double() for _ in range(4000)) / 4000
    step = 1 / QUANTIZED[name].levels
    assert (mean - values).abs().max() < 5 * step / 2 / 4000**0.5 + 1e-6  # five standard errors
    nearest_error = (pack(values, name).values - values).abs().max()
    assert nearest_error > 10 * 1e-3 * step


def test_the_draws_are_of_seed_round_and_client():
    values = vector(1000)

    def seen(encoding: Encoding, t: int, i: int) -> torch.Tensor:
        return pack(values, encoding.format, encoding.noise(t, i)).values

    encoding = Encoding("int4", "stochastic", seed=3)
    assert torch.equal(seen(encoding, 5, 2), seen(encoding, 5, 2))
    for other in (seen(encoding, 6, 2), seen(encoding, 5, 1), seen(Encoding("int4", "stochastic", seed=4), 5, 2)):
        assert not torch.equal(seen(encoding, 5, 2), other)
    assert Encoding("int4", "nearest").noise(5, 2) is None


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zero_and_the_largest_is_never_clipped(name):
    assert pack(torch.zeros(300), name, draws()).values.abs().max() == 0
    values = vector(64)
    largest = values.abs().argmax()
    assert pack(values, name).values[largest].item() == pytest.approx(values[largest].item(), rel=0.01)


@pytest.mark.parametrize("name", FORMATS)
def test_tiny_and_huge_magnitudes_stay_finite(name):
    for magnitude in (1e-38, 1e-30, 1e30, 3e37):
        seen = pack(vector(200) * 1e3 * magnitude, name).values
        assert seen.isfinite().all()
    assert pack(torch.full((64,), 1e-30), name).values.mean().item() == pytest.approx(1e-30, rel=0.02)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.sampled_from(FORMATS))
def test_any_finite_vector_comes_back_within_a_step_of_its_group(numbers, name):
    values = torch.tensor(numbers)
    kind = QUANTIZED[name]
    seen = pack(values, name).values
    for first in range(0, len(numbers), kind.group):
        group = slice(first, first + kind.group)
        bound = 0.51 * values[group].abs().max() / kind.levels * (1 + 2**-7) + 1e-37
        assert (seen[group] - values[group]).abs().max() <= bound


def test_packing_in_pieces_is_packing_at_once():
    """A vector of many pieces equals its pieces packed alone, with the draws going on."""
    values = vector(2 * PIECE + 640)
    generator = draws(1)
    whole = pack(values, "int4", draws(1)).values
    parts = [pack(values[k : k + PIECE], "int4", generator).values for k in range(0, len(values), PIECE)]
    assert torch.equal(whole, torch.cat(parts))
    assert ceil(len(values) / PIECE) == 3


def test_a_rounding_of_another_name_is_refused_and_not_taken_for_stochastic():
    with pytest.raises(ValueError, match="'floor' is none of nearest, stochastic"):
        Encoding("int8", rounding="floor").noise(0, 0)
