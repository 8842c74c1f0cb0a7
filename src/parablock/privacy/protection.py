"""Client-side protection of an update: clipping, and noise for local or distributed differential privacy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from math import exp, pi, sqrt

import numpy as np
from torch import Tensor

from parablock.algorithm.robust import Normals, clip_factor, scale

LOCAL_DISTANCE = 2.0
"""Largest distance of two updates, in clip norms."""
MOST_ELEMENTS = 2.0**40
"""More than an update has."""

Integers = Callable[[int], "np.ndarray[tuple[int], np.dtype[np.int32]]"]
"""n → the next n whole numbers."""


@dataclass(frozen=True)
class Protection:
    """Clip an update, then add noise.

    Attributes:
        clip_norm: C: the largest norm of an update before noise.
        noise_multiplier: z: the noise of each element has the standard deviation z·C; 0: no noise.
        normals: (round_index, hash of the clipped update) → the draws; needed with noise. The same draws never
            cover two updates: their difference would lie open.
        integers: The same for the words of an update: what a client adds to them of a sum's noise; None: nothing.
    """

    clip_norm: float
    noise_multiplier: float = 0.0
    normals: Callable[[int, str], Normals] | None = None
    integers: Callable[[int, str], Integers] | None = None

    def apply(self, delta: Tensor, round_index: int) -> tuple[Tensor, float]:
        """Return the protected Δ (flat, fp32) of a round, and the factor of clipping."""
        factor = clip_factor([delta], self.clip_norm)
        clipped = scale(delta, factor)
        if self.normals is None:
            return clipped, factor
        content = sha256(clipped.contiguous().cpu().numpy().data).hexdigest()
        noise = self.normals(round_index, content)(delta.numel()).to(delta.device)
        return clipped + (self.noise_multiplier * self.clip_norm) * noise, factor

    def hide(self, words: Tensor, round_index: int) -> None:
        """Add this client's noise to the words of its update, 1-D, int32, in their place."""
        if self.integers is not None:
            numbers = words.numpy()
            numbers += self.integers(round_index, sha256(numbers.data).hexdigest())(len(numbers))


def summed_multiplier(noise_multiplier: float, num_clients: int, variance: float) -> float:
    r"""Return the multiplier of a Gaussian that hides no less than the summed noise of clients, of z in all.

    With τ = 10 · Σ_{k<M} exp(−2π² σ² k/(k+1)), for M clients of variance σ² ≥ 1/4 and n elements, the Rényi
    divergence of order a is at most a/2 · (1/z + √n · τ)². τ is 0 in double precision from σ = 9 on.

    Source: Kairouz, Liu and Steinke, The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation, 2021, theorem 1 and proposition 14.
    """
    if variance < 0.25:
        return 0.0
    spread = 2 * pi**2 * variance
    tau = 10 * (num_clients - 1) * exp(-spread / 2)  # k = 1 gives the largest summand
    return 1 / (1 / noise_multiplier + sqrt(MOST_ELEMENTS) * tau)


def effective_multiplier(noise_multiplier: float, *, is_local: bool) -> float:
    """Return the multiplier of the Gaussian mechanism that an update goes through; see `privacy/accounting.py`."""
    return noise_multiplier / (LOCAL_DISTANCE if is_local else 1.0)


def threshold_of(num_clients: int) -> int:
    """Return the number of clients of a cohort that have to stay: all but a third."""
    return num_clients - num_clients // 3
