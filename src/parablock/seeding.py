"""Random number generators: one for each (seed, purpose, round, client), and no global one.

A draw depends neither on the order of the threads nor on earlier draws. So a resumed run draws the same numbers
as an uninterrupted one.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(seed: int, purpose: str, *indices: int) -> int:
    """Derive a seed in [0, 2**63) from the run's seed.

    Args:
        seed: The run's seed (`seed` in the configuration).
        purpose: The use of the draws, such as `"cohort"`; purposes never share a stream.
        *indices: Numbers that tell streams of one purpose apart: round_index, client_id, epoch.
    """
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the generator of one stream; see `seed_for` for the arguments."""
    return np.random.Generator(np.random.PCG64(seed_for(seed, purpose, *indices)))
