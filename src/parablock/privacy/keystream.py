"""Secret random streams: ChaCha20 keystreams for noise and masks.

Draws of `seeding` can be repeated with the run's seed, which is not secret. So noise and masks come from ChaCha20
instead, under a key from the operating system. A resumed run uses the same key and adds the same noise to the same
update; fresh noise would allow averaging.
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
    """Derive the key of one purpose, which the keys of other purposes do not reveal.

    Source: HKDF, RFC 5869.
    """
    info = ":".join(["parablock", *map(str, purpose)]).encode()
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(key)


class Keystream:
    """The ChaCha20 stream of a key from `derive`; the key has no other use."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, num_words: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """Draw the next uniform 32-bit words."""
        return np.frombuffer(self._cipher.update(bytes(4 * num_words)), dtype="<u4")

    def normals(self, num_elements: int) -> Tensor:
        """Draw the next standard normal numbers, in pairs; return them 1-D, fp32.

        Source: Box and Muller, 1958, on 53 random bits.
        """
        pairs = (num_elements + 1) // 2
        bits = self.words(4 * pairs).view("<u8").reshape(pairs, 2).T >> np.uint64(11)
        uniform = np.ascontiguousarray((bits + 1.0) * 2.0**-53)  # in (0, 1]
        radius, angle = np.sqrt(-2.0 * np.log(uniform[0])), 2.0 * np.pi * uniform[1]
        drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
        return torch.from_numpy(drawn[:num_elements].astype(np.float32))
