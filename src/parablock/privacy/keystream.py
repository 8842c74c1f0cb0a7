"""Secret randomness: streams that nobody can predict without their key.

`seeding` makes draws that anybody can repeat who knows the run's seed, which stands in the configuration. Noise
that hides an update, and masks, must not be such draws. They come from ChaCha20 under a key from the operating
system; whoever has the key can repeat them, which is how a resumed run adds the same noise to the same update
and not fresh noise, with which the first could be averaged out.
"""

from __future__ import annotations

import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

KEY_BYTES = 32


def new_key() -> bytes:
    """Draw a key from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def derive(key: bytes, *purpose: str | int) -> bytes:
    """Derive the key of one purpose; those of others tell nothing about it.

    Source: HKDF, RFC 5869.
    """
    info = ":".join(["parablock", *map(str, purpose)]).encode()
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(key)


class Keystream:
    """The ChaCha20 stream of a key, which is used for nothing else.

    Args:
        key: From `derive`.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, num_words: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """Draw the next uniform words of 32 bits."""
        return np.frombuffer(self._cipher.update(bytes(4 * num_words)), dtype="<u4")

    def normals(self, num_elements: int) -> Tensor:
        """Draw the next standard normal numbers, in pairs: an odd number leaves one behind.

        Returns:
            1-D, fp32.

        Source: Box and Muller, 1958, on 53 random bits.
        """
        pairs = (num_elements + 1) // 2
        bits = self.words(4 * pairs).view("<u8").reshape(pairs, 2).T >> np.uint64(11)
        uniform = np.ascontiguousarray((bits + 1.0) * 2.0**-53)  # in (0, 1]
        radius, angle = np.sqrt(-2.0 * np.log(uniform[0])), 2.0 * np.pi * uniform[1]
        drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
        return torch.from_numpy(drawn[:num_elements].astype(np.float32))
