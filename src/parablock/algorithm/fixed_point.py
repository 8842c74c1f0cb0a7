"""Updates on a fixed-point grid: whole numbers whose sum is exact, in any order, and modulo 2^32.

What has to be agreed before anybody sends is one number, the step. It follows from the bound C of an update's norm,
which bounds each element too, and from the number M of clients in a round: with L = ⌊(2^31 − 1) / M⌋ levels on
either side of 0 and steps of C / L, no sum of M updates leaves 32 bits. Both are the same for every block and
round, and that is no loss: with some 28 bits a step is finer than what float32 keeps of a mean of such updates.

Every client counts once, since a sum of which nobody sees a part cannot be weighted by what each of them claims.
One more element carries ‖Δ‖² / C², so that the server has the denominator of ρ from the sum as well.

    words of one update = round(Δ / step), round(L · ‖Δ‖² / C²)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parablock.algorithm.aggregate import SLICE, Folded
from parablock.algorithm.robust import Normals, RoundAggregation, Rule, squared_norm

EXTRA_WORDS = 1
"""Elements of an update beyond those of its block."""


@dataclass(frozen=True)
class FixedPointGrid:
    """The grid of a run.

    Attributes:
        clip_norm: C: the norm that no update exceeds.
        num_clients: M: the clients of a round.
    """

    clip_norm: float
    num_clients: int

    @property
    def levels(self) -> int:
        """L: the largest word of an update."""
        return (2**31 - 1) // self.num_clients

    @property
    def step(self) -> float:
        """What one unit is worth."""
        return self.clip_norm / self.levels

    def encode(self, delta: Tensor) -> Tensor:
        """Give the words of an update.

        Args:
            delta: Δ, flat, fp32, no longer than C (rounding apart).

        Returns:
            1-D, int32, of `EXTRA_WORDS` more elements; rounded to nearest.
        """
        squared = min(1.0, squared_norm([delta]) / self.clip_norm**2)
        words = torch.cat([delta.double() / self.step, torch.tensor([squared * self.levels], dtype=torch.float64)])
        return words.round_().clamp_(-self.levels, self.levels).to(torch.int32)

    def decode(self, words: Tensor) -> Tensor:
        """Give what an update says: flat, fp32."""
        return (words[:-EXTRA_WORDS].double() * self.step).float()

    def mean(self, total: Tensor, num_updates: int) -> tuple[Tensor, float]:
        """Give Δ̄ (flat, fp32) and the mean of ‖Δ_i‖², of a sum of words."""
        mean = torch.empty(total.numel() - EXTRA_WORDS)
        for first in range(0, mean.numel(), SLICE):
            part = slice(first, min(first + SLICE, mean.numel()))
            mean[part] = total[part].double() * (self.step / num_updates)
        return mean, float(total[-1]) / self.levels * self.clip_norm**2 / num_updates


class FixedPointAggregation(RoundAggregation):
    """One round's updates on the grid; a sum that nobody can look into, where they are masked.

    Args:
        grid: The run's grid.
        rule: The mean, with noise or without.
        normals: As for `RoundAggregation`.
    """

    folds_parts = False

    def __init__(
        self, grid: FixedPointGrid, rule: Rule, normals: Callable[[tuple[int, ...]], Normals] | None = None
    ) -> None:
        super().__init__(rule, normals)
        self._grid = grid

    @property
    def needs_whole(self) -> bool:
        """Updates on the grid come whole."""
        return False

    @property
    def bounds_updates(self) -> bool:
        """No word is larger than the grid, and the norm of a masked update says nothing."""
        return True

    def _folded(self, updates: Mapping[int, tuple[Tensor, int]]) -> Folded:
        """Add up the words of every update, take the masks off, and make Δ̄."""
        numbers = np.zeros(0, np.uint32)
        for words, _ in updates.values():  # one after the other: they need not be in memory together
            numbers = np.add(numbers, _modulo(words), out=numbers) if len(numbers) else _modulo(words).copy()
        if self.masks is not None:
            numbers -= _modulo(self.masks)
        total = torch.from_numpy(numbers.view(np.int32))  # a number of either sign
        mean, mean_squared_norm = self._grid.mean(total, len(updates))
        if self._normals is not None:
            mean = self._noisy(mean, tuple(sorted(updates)))
        return Folded(mean, (squared_norm([mean]),), (mean_squared_norm,))


def _modulo(words: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """Give words as numbers modulo 2^32, which add up without leaving them."""
    return words.numpy().view(np.uint32)
