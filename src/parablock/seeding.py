"""The only source of randomness: a generator for each (seed, purpose, round, client).

Nothing in ParaBlock touches a global generator. A generator is made from the run's seed and from what it
is for, so a draw depends neither on which thread came first nor on what was drawn before, and a run
resumed in the middle draws what it would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(seed: int, purpose: str, *indices: int) -> int:
    """Derive a 63-bit seed.

    Args:
        seed: The run's seed (`seed` in the configuration).
        purpose: What the draws are for, such as `"cohort"`; purposes never share a stream.
        *indices: What else tells this stream from its siblings: round_index, client_id, epoch.

    Returns:
        An integer in [0, 2**63).
    """
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Make the generator of one stream; see `seed_for` for the arguments."""
    return np.random.Generator(np.random.PCG64(seed_for(seed, purpose, *indices)))
