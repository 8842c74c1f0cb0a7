"""Fixed-point updates for secure aggregation: integers whose sum modulo 2^32 is exact in any order.

Client and server have to agree on one number, the step. It follows from the bound C of an update's norm and from
the number M of clients in a round: with L = ⌊(2^31 − 1) / M⌋ levels on either side of 0 and steps of C / L, no sum
of M updates overflows 32 bits. Such a step is finer than the rounding of float32 in a mean of these updates.

Every client has the same weight, since the server cannot check weights inside a sum. One extra element carries
‖Δ‖² / C², so that the sum also contains the denominator of ρ.

    words of one update = round(Δ / step), round(L · ‖Δ‖² / C²)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parablock.algorithm.aggregate import SLICE, Folded
from parablock.algorithm.robust import NoiseOfUpdates, RoundAggregation, Rule, squared_norm

EXTRA_WORDS = 1
"""Elements that an update has beyond those of its block."""


@dataclass(frozen=True)
class FixedPointGrid:
    """The fixed-point grid of a run: C, the largest norm of an update, and M, the number of clients in a round."""

    clip_norm: float
    num_clients: int

    @property
    def levels(self) -> int:
        """L: the largest word of an update."""
        return (2**31 - 1) // self.num_clients

    @property
    def step(self) -> float:
        """The value of one unit."""
        return self.clip_norm / self.levels

    def encode(self, delta: Tensor) -> Tensor:
        """Return the words of an update no longer than C, to nearest: 1-D, int32, with `EXTRA_WORDS` more."""
        squared = min(1.0, squared_norm([delta]) / self.clip_norm**2)
        words = torch.cat([delta.double() / self.step, torch.tensor([squared * self.levels], dtype=torch.float64)])
        return words.round_().clamp_(-self.levels, self.levels).to(torch.int32)

    def decode(self, words: Tensor) -> Tensor:
        """Return the Δ of an update: flat, fp32."""
        return (words[:-EXTRA_WORDS].double() * self.step).float()

    def mean(self, total: Tensor, num_updates: int) -> tuple[Tensor, float]:
        """Return Δ̄ (flat, fp32) and the mean of ‖Δ_i‖² from a sum of words."""
        mean = torch.empty(total.numel() - EXTRA_WORDS)
        for first in range(0, mean.numel(), SLICE):
            part = slice(first, min(first + SLICE, mean.numel()))
            mean[part] = total[part].double() * (self.step / num_updates)
        return mean, float(total[-1]) / self.levels * self.clip_norm**2 / num_updates

    def absurd(self, mean: Tensor, mean_squared_norm: float) -> str:
        """Return why a mean cannot be one of updates no longer than C; empty if it can.

        ‖Δ̄‖² is at most the mean of the ‖Δ_i‖², and that is at most C²; rounding adds up to a step to an element.
        """
        bound = self.clip_norm**2
        slack = 1e-6 * bound + mean.numel() * self.step**2 + 2 * self.clip_norm * self.step * mean.numel() ** 0.5
        squared = squared_norm([mean])
        if not -slack <= mean_squared_norm <= bound + slack:
            return f"the mean of their squared norms is {mean_squared_norm:.3g}, beyond the bound of {bound:.3g}"
        if squared > mean_squared_norm + slack:
            return f"their mean has the squared norm {squared:.3g}, more than the mean of theirs"
        return ""


class FixedPointAggregation(RoundAggregation):
    """The aggregation of one round's fixed-point updates, masked or not, by the mean with or without noise.

    With noise, `hash_of` makes the `content` from the sum of the words, which is the same masked or not.
    """

    folds_parts = False

    def __init__(
        self,
        grid: FixedPointGrid,
        rule: Rule,
        normals: NoiseOfUpdates | None = None,
        hash_of: Callable[[memoryview], str] = lambda _: "",
    ) -> None:
        super().__init__(rule, normals)
        self._grid, self._hash_of = grid, hash_of

    @property
    def needs_whole(self) -> bool:
        """False: fixed-point updates always come whole."""
        return False

    @property
    def bounds_updates(self) -> bool:
        """True: the grid bounds every word, and the norm of a masked update means nothing."""
        return True

    def _fold_part(self, updates: Mapping[int, tuple[Tensor, int]]) -> Folded:
        """Add up the words of every update, subtract the masks, and decode Δ̄."""
        numbers = np.zeros(0, np.uint32)
        for words, _ in updates.values():  # one after the other: the updates need not be in memory together
            numbers = np.add(numbers, _modulo(words), out=numbers) if len(numbers) else _modulo(words).copy()
        if self.masks is not None:
            numbers -= _modulo(self.masks)
        total = torch.from_numpy(numbers.view(np.int32))  # signed
        mean, mean_squared_norm = self._grid.mean(total, len(updates))
        self.absurd = self._grid.absurd(mean, mean_squared_norm)
        if self._normals is not None:
            self.content = self._hash_of(numbers.data)
            mean = self._add_noise(mean, tuple(sorted(updates)))
        return Folded(mean, (squared_norm([mean]),), (mean_squared_norm,))


def _modulo(words: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """View words as unsigned integers, which wrap around modulo 2^32."""
    return words.numpy().view(np.uint32)
