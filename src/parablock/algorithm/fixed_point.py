"""Fixed-point updates for secure aggregation: integers whose sum modulo 2^32 is exact in any order.

Client and server have to agree on one number, the step. It follows from the bound C of an update's norm and from
the number M of clients in a round: with L = ⌊(2^31 − 1) / M⌋ levels on either side of 0 and steps of C / L, no sum
of M updates overflows 32 bits. Such a step is finer than the rounding of float32 in a mean of these updates.

Every client has the same weight, since the server cannot check weights inside a sum. One extra element carries
‖Δ‖² / C², so that the sum also contains the denominator of ρ.

    words of one update = round(Δ / step), round(L · ‖Δ‖² / C²)

With distributed noise each client adds integers to its words, whose standard deviation is z · L / √m units: the sum
of any m clients, the fewest whose sum may be known, has the noise z · C, and one of more clients has more. The
levels are fewer then, so that the sum and ten standard deviations of its noise fit. Words are rounded towards 0, so
that no update gets longer than L; the extra element is 0: it would be a second question about each client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from parablock.algorithm.aggregate import SLICE, Folded
from parablock.algorithm.robust import NoiseOfUpdates, RoundAggregation, Rule, squared_norm

EXTRA_WORDS = 1
"""Elements that an update has beyond those of its block."""
DEVIATIONS_OF_ROOM = 10
"""Standard deviations of a sum's noise that fit beside the updates; a word leaves them once in 10^22 times."""
MARGIN = 1e-9
"""Part of a length by which double precision may be wrong, and more."""


@dataclass(frozen=True)
class FixedPointGrid:
    """The fixed-point grid of a run.

    Attributes:
        clip_norm: C: the largest norm of an update.
        num_clients: M: the clients in a round.
        noise_multiplier: z, of distributed noise; 0: clients add none.
        fewest_clients: m: the fewest clients whose sum may be known.
    """

    clip_norm: float
    num_clients: int
    noise_multiplier: float = 0.0
    fewest_clients: int = 1

    @property
    def levels(self) -> int:
        """L: the largest word of an update."""
        noise = self.noise_multiplier * sqrt(self.num_clients / self.fewest_clients)
        return int((2**31 - 1) // (self.num_clients + DEVIATIONS_OF_ROOM * noise))

    @property
    def noise_variance(self) -> float:
        """The variance of each client's noise, in squared units."""
        return (self.noise_multiplier * self.levels) ** 2 / self.fewest_clients

    @property
    def step(self) -> float:
        """The value of one unit."""
        return self.clip_norm / self.levels

    def encode(self, delta: Tensor) -> Tensor:
        """Return the words of an update no longer than C, before noise: 1-D, int32, with `EXTRA_WORDS` more."""
        if self.noise_multiplier > 0:
            return self._encode_no_longer(delta)
        squared = min(1.0, squared_norm([delta]) / self.clip_norm**2)
        words = torch.cat([delta.double() / self.step, torch.tensor([squared * self.levels], dtype=torch.float64)])
        return words.round_().clamp_(-self.levels, self.levels).to(torch.int32)

    def _encode_no_longer(self, delta: Tensor) -> Tensor:
        """Round towards 0 what is no longer than C in double precision."""
        exact = delta.double()
        longest = (1 - MARGIN) * self.clip_norm
        factor = min(1.0, longest / norm) if (norm := sqrt(squared_norm([exact]))) > 0 else 1.0
        words = torch.zeros(delta.numel() + EXTRA_WORDS, dtype=torch.int32)
        words[:-EXTRA_WORDS] = exact.mul_(factor / self.step).trunc_()
        return words

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

    def deviation_of_mean(self, num_updates: int) -> float:
        """Return the standard deviation of the clients' noise in the mean of so many updates."""
        return sqrt(self.noise_variance / num_updates) * self.step

    def absurd(self, mean: Tensor, mean_squared_norm: float, num_updates: int) -> str:
        """Return why a mean cannot be one of updates no longer than C; empty if it can.

        ‖Δ̄‖² is at most the mean of the ‖Δ_i‖², and that is at most C²; rounding adds up to a step to an element.
        Noise of n elements and deviation σ is longer than σ √(n + 2 √(n t) + 2 t) once in e^t times.

        Source of the last: Hsu, Kakade and Zhang, A Tail Inequality for Quadratic Forms of Subgaussian Random
        Vectors, 2012.
        """
        if self.noise_multiplier > 0:
            size, unlikely = mean.numel(), 50.0
            noise = self.deviation_of_mean(num_updates) * sqrt(size + 2 * sqrt(size * unlikely) + 2 * unlikely)
            if mean_squared_norm != 0 or (norm := sqrt(squared_norm([mean]))) > 1.000001 * (self.clip_norm + noise):
                told = "its last word is not 0" if mean_squared_norm else f"it is {norm:.3g} long"
                return f"their mean is none of updates within {self.clip_norm:.3g} and noise of {noise:.3g}: {told}"
            return ""
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

    With noise of the server, `hash_of` makes the `content` from the sum of the words, the same masked or not.
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
        self.absurd = self._grid.absurd(mean, mean_squared_norm, len(updates))
        self._num_clients, self._deviation = len(updates), self._grid.deviation_of_mean(len(updates))
        if self._normals is not None:
            self.content = self._hash_of(numbers.data)
            mean = self._add_noise(mean, tuple(sorted(updates)))
        return Folded(mean, (squared_norm([mean]),), (mean_squared_norm,))


def _modulo(words: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """View words as unsigned integers, which wrap around modulo 2^32."""
    return words.numpy().view(np.uint32)
