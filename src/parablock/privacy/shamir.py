"""Secrets in shares: any k of them give the secret back, fewer tell nothing of it.

A secret of 32 bytes is the value at 0 of a polynomial of degree k − 1 over the integers modulo a prime, whose other
coefficients are random; a share is its value at another place.

Source: Shamir, How to Share a Secret, 1979.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

PRIME = 2**256 + 297
"""The smallest prime above 2^256."""

SHARE_BYTES = 33


def split(secret: bytes, num_shares: int, threshold: int) -> list[bytes]:
    """Split a secret of 32 bytes; share number i (from 0) is the polynomial's value at i + 1."""
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, num_shares + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """Give the secret back from as many shares as its threshold, or more.

    Args:
        shares: For each number of a share (from 0) the share.

    Raises:
        ValueError: They are not shares of one secret of 32 bytes, as far as can be seen.
    """
    places = {number + 1: int.from_bytes(share, "big") for number, share in shares.items()}
    secret = 0
    for x, value in places.items():
        numerator = denominator = 1
        for other in places:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        secret = (secret + value * numerator * pow(denominator, -1, PRIME)) % PRIME
    if secret >= 2**256:
        raise ValueError(f"{len(shares)} shares give no secret of 32 bytes")
    return secret.to_bytes(32, "big")
