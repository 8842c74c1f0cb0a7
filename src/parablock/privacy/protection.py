"""Client-side protection of an update: clipping, and noise for local differential privacy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor

from parablock.algorithm.robust import Normals, clip_factor, scale

LOCAL_DISTANCE = 2.0
"""Largest distance of two updates, in clip norms."""


@dataclass(frozen=True)
class Protection:
    """Clip an update, then add noise.

    Attributes:
        clip_norm: C: the largest norm of an update before noise.
        noise_multiplier: z: the noise of each element has the standard deviation z·C; 0: no noise.
        normals: (round_index, hash of the clipped update) → the draws; needed with noise. The same draws never
            cover two updates: their difference would lie open.
    """

    clip_norm: float
    noise_multiplier: float = 0.0
    normals: Callable[[int, str], Normals] | None = None

    def apply(self, delta: Tensor, round_index: int) -> tuple[Tensor, float]:
        """Return the protected Δ (flat, fp32) of a round, and the factor of clipping."""
        factor = clip_factor([delta], self.clip_norm)
        clipped = scale(delta, factor)
        if self.normals is None:
            return clipped, factor
        content = sha256(clipped.contiguous().cpu().numpy().data).hexdigest()
        noise = self.normals(round_index, content)(delta.numel()).to(delta.device)
        return clipped + (self.noise_multiplier * self.clip_norm) * noise, factor


def effective_multiplier(noise_multiplier: float, *, is_local: bool) -> float:
    """Return the multiplier of the Gaussian mechanism that an update goes through; see `privacy/accounting.py`."""
    return noise_multiplier / (LOCAL_DISTANCE if is_local else 1.0)


def threshold_of(num_clients: int) -> int:
    """Return the number of clients of a cohort that have to stay: all but a third."""
    return num_clients - num_clients // 3
