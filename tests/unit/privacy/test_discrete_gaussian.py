"""The discrete Gaussian: its distribution against the exact one, its table to the last bit, and its source."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from parablock.privacy.discrete_gaussian import (
    CELL_BITS,
    CELL_WEIGHT,
    MAX_VARIANCE,
    DiscreteGaussian,
    alias_table,
    gaussian_weights,
)
from parablock.privacy.keystream import Keystream, derive, new_key

KEY = bytes(range(32))
DRAWS = 400_000


def stream(*purpose: str | int) -> Keystream:
    return Keystream(derive(KEY, *purpose))


def chi_square(drawn: np.ndarray, variance: float, num_bins: int = 40) -> float:
    """Return how many standard deviations chi-square of draws lies above what the exact probabilities give."""
    reach = int(12 * variance**0.5)
    places = np.arange(-reach, reach + 1)
    density = np.exp(-(places.astype(float) ** 2) / (2 * variance))
    edges = np.unique(np.quantile(drawn, np.linspace(0, 1, num_bins + 1)[1:-1], method="nearest"))
    expected = np.add.reduceat(density, [0, *(edges + reach)]) / density.sum() * len(drawn)
    found = np.bincount(np.searchsorted(edges, drawn, side="right"), minlength=len(expected))
    degrees = len(expected) - 1
    return float((((found - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize("deviation", [0.4, 1.0, 3.7, 63.0, 65.0, 1000.0, 30_000.0])
def test_draws_have_the_exact_distribution_and_no_other(deviation: float):
    drawn = DiscreteGaussian(deviation**2).draw(stream("chi", int(10 * deviation)), DRAWS)
    assert len(drawn) == DRAWS and drawn.dtype == np.int32
    assert chi_square(drawn, deviation**2) < 5
    assert chi_square(drawn, (1.02 * deviation) ** 2) > 20, "two in a hundred more or less are seen"
    assert chi_square(drawn, (0.98 * deviation) ** 2) > 20


def test_within_a_block_the_inner_places_are_taken_more_often_as_they_should_be():
    """At σ = 1024 a block has 32 places, which only rejection tells apart; here all blocks beyond σ together."""
    drawn = DiscreteGaussian(1024.0**2).draw(stream("blocks"), 1_000_000)
    places = np.arange(-12 * 1024, 12 * 1024)
    density = np.exp(-(places.astype(float) ** 2) / (2 * 1024.0**2))

    def laid_over(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        outward = np.where(values < 0, -1 - values, values)
        far = outward >= 1024
        return np.bincount(outward[far] % 32, None if weights is None else weights[far], minlength=32)

    found, exact = laid_over(drawn), laid_over(places, density)
    for expected, fits in ((exact / exact.sum() * found.sum(), True), (np.full(32, found.sum() / 32), False)):
        excess = (((found - expected) ** 2 / expected).sum() - 31) / (2 * 31) ** 0.5
        assert bool(excess < 5) is fits, excess


@pytest.mark.parametrize("variance", [0.16, 3.7**2, 63.9**2, 64.1**2, 1e8**2])
def test_the_table_is_that_of_the_exact_weights_and_they_are_those_of_the_formula(variance: float):
    gaussian = DiscreteGaussian(variance)
    places = [int(place) for place in gaussian._inner]
    weights = gaussian_weights(places, variance)
    limits, other = alias_table(weights)
    assert sum(weights) == CELL_WEIGHT << CELL_BITS
    met = [0] * (1 << CELL_BITS)
    for cell, (limit, giver) in enumerate(zip(limits.tolist(), other.tolist(), strict=True)):
        own = CELL_WEIGHT if giver == cell else limit
        met[cell] += own
        met[giver] += CELL_WEIGHT - own
    assert met[: len(weights)] == weights and not any(met[len(weights) :])
    with localcontext() as context:
        context.prec = 80
        density = [(-(Decimal(place) ** 2) / (2 * Decimal(variance))).exp() for place in places]
        exact = [Fraction(each) / Fraction(sum(density)) for each in density]
    whole = CELL_WEIGHT << CELL_BITS
    distance = sum(abs(Fraction(weight, whole) - each) for weight, each in zip(weights, exact, strict=True)) / 2
    assert distance < Fraction(1, 2**64)
    weights[0] -= 2**12
    coarse = sum(abs(Fraction(weight, whole) - each) for weight, each in zip(weights, exact, strict=True)) / 2
    assert coarse > Fraction(1, 2**65), "the same with one weight a little off is measured"


def test_the_same_key_gives_the_same_draws_and_no_generator_of_numbers_does():
    gaussian = DiscreteGaussian(5.0**2)
    once = gaussian.draw(stream("a", 1), 1000)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert np.array_equal(gaussian.draw(stream("a", 1), 1000), once)
    for other in (stream("a", 2), stream("b", 1), Keystream(derive(new_key(), "a", 1))):
        assert not np.array_equal(gaussian.draw(other, 1000), once)


@pytest.mark.parametrize("variance", [0.0, -1.0, 2 * MAX_VARIANCE])
def test_a_variance_that_cannot_be_is_refused(variance: float):
    with pytest.raises(ValueError, match="a variance of"):
        DiscreteGaussian(variance)
