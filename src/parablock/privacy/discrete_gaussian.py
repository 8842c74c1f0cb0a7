r"""Whole numbers from the discrete Gaussian distribution, out of secret random words, by the million.

P(x) ∝ exp(−x² / 2σ²) for every integer x. Unlike rounded or floating-point noise it leaves no gaps that betray what
it covers, and integers add up exactly under masks.

The integers within 12 σ are cut into at most 2,048 blocks of w = 2^k, with σ/64 < w ≤ σ/32 (single integers below
σ = 64). A draw takes a block with a probability that is proportional to w · P(the block's inner edge), then one of
its w integers, which is kept with probability P(x) / P(inner edge), at least 0.68; most are. What is kept has the
distribution itself.

How far it is from exact: blocks are chosen by 75 random bits and a table of whole numbers, made of probabilities
with 50 digits, so that their total variation distance is below 2^-64; beyond 12 σ lie less than 2^-100. The last
step compares 53 random bits with a double, so that each probability is within a factor of 1 ± 2^-48. For a release
of n words the two add at most n · 2^-47 to ε and n · 2^-63 to δ: 4·10⁻⁷ and 6·10⁻¹² for 50 million words. The
reported ε does not contain them, nor the assumption that ChaCha20 cannot be told from chance.

Source: Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy, 2020 (the distribution);
Marsaglia and Tsang, The Ziggurat Method for Generating Random Variables, 2000 (rejection from blocks); Vose, A
Linear Algorithm for Generating Random Numbers with a Given Distribution, 1991 (the table).
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from math import ceil, floor, log2, sqrt

import numpy as np

from parablock.privacy.keystream import Keystream

Integers = np.ndarray[tuple[int], np.dtype[np.int32]]
Places = np.ndarray[tuple[int], np.dtype[np.int64]]

REACH = 12
"""The largest draw, in standard deviations."""
CELL_BITS = 11
CELL_WEIGHT = 1 << 64
MAX_VARIANCE = 2.0**54
"""With more, draws would not fit 32 bits."""
WORDS_A_DRAW = 5
PIECE = 1 << 15
"""Draws at a time; small enough for the cache."""


class DiscreteGaussian:
    """The discrete Gaussian around 0 whose parameter σ² is `variance`, which may be any positive number.

    Raises:
        ValueError: The variance is not positive, or above `MAX_VARIANCE`.
    """

    def __init__(self, variance: float) -> None:
        if not 0 < variance <= MAX_VARIANCE:
            raise ValueError(f"a variance of {variance:g} is not between 0 and {MAX_VARIANCE:g}")
        self.variance = variance
        self._shift = max(0, floor(log2(sqrt(variance) / 32)))
        num_half = ceil(REACH * sqrt(variance) / (1 << self._shift))
        rising = [block << self._shift for block in range(num_half)]
        inner = [*rising, *(-1 - edge for edge in rising)]
        self._inner = np.array(inner, np.int64)
        self._twice = 2.0 * np.abs(self._inner)
        self._sign = np.where(self._inner < 0, -1, 1)
        self._limits, self._other = alias_table(gaussian_weights(inner, variance))

    def draw(self, stream: Keystream, num_draws: int) -> Integers:
        """Return the next draws from a stream, which has no other use."""
        drawn, filled = np.empty(num_draws, np.int32), 0
        while filled < num_draws:
            kept = self._kept(stream, min(PIECE, num_draws - filled))
            drawn[filled : filled + len(kept)] = kept
            filled += len(kept)
        return drawn

    def _kept(self, stream: Keystream, num_draws: int) -> Places:
        words = stream.words(WORDS_A_DRAW * num_draws)
        mixed, chance = words[: 4 * num_draws].view("<u8").reshape(2, num_draws)
        cell = (mixed & np.uint64((1 << CELL_BITS) - 1)).astype(np.intp)
        block = np.where(chance < self._limits[cell], cell, self._other[cell])
        offset = words[4 * num_draws :] & np.uint32((1 << self._shift) - 1)
        found: Places = self._inner[block] + self._sign[block] * offset
        if not self._shift:  # a block is one integer
            return found
        beyond = offset * (offset + self._twice[block])  # x² less the square of the inner edge
        beyond *= -0.5 / self.variance
        uniform = (mixed >> np.uint64(CELL_BITS)) * 2.0**-53
        kept: Places = found[uniform < np.exp(beyond, out=beyond)]
        return kept


def gaussian_weights(places: Sequence[int], variance: float) -> list[int]:
    """Return exp(−x² / 2σ²) of places, as whole numbers that add up to that many cells of the table."""
    with localcontext() as context:
        context.prec = 50
        twice = 2 * Decimal(variance)
        density = [(-Decimal(place * place) / twice).exp() for place in places]
        total, whole = sum(density), CELL_WEIGHT << CELL_BITS
        weights = [int((each / total * whole).to_integral_value()) for each in density]
    weights[0] += whole - sum(weights)  # a unit or so of each, of 2^75
    return weights


def alias_table(weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of 2^11 cells the limit below which a word of 64 bits means the cell, and what it means else.

    Source: Vose, 1991, in whole numbers, so that every weight is met exactly.
    """
    num_cells = 1 << CELL_BITS
    left = [*weights, *([0] * (num_cells - len(weights)))]
    limits, other = [CELL_WEIGHT] * num_cells, list(range(num_cells))
    small = [cell for cell in range(num_cells) if left[cell] < CELL_WEIGHT]
    large = [cell for cell in range(num_cells) if left[cell] > CELL_WEIGHT]
    while small:
        cell, giver = small.pop(), large[-1]
        limits[cell], other[cell] = left[cell], giver
        left[giver] -= CELL_WEIGHT - left[cell]
        if left[giver] <= CELL_WEIGHT:
            large.pop()
            if left[giver] < CELL_WEIGHT:
                small.append(giver)
    # a full cell means itself either way
    return np.array([min(limit, CELL_WEIGHT - 1) for limit in limits], np.uint64), np.array(other, np.intp)
