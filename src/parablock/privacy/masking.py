r"""The cryptography of secure aggregation: pairwise masks, key agreement, sealed letters, secret sharing.

In round t, client i of a cohort sends, instead of its fixed-point words x_i, modulo 2^32

    y_i = x_i + PRG(b_i) + Σ_{j > i} PRG(s_ij) − Σ_{j < i} PRG(s_ij)

where s_ij is the secret that i and j agree on (X25519 with keys of this round alone, then HKDF), and b_i is a
secret of client i. In the sum over all clients the masks of s_ij cancel. If client j sends nothing, the others'
shares of its key let the server compute every s_ij. If client i sends its update, the others' shares of b_i let the
server subtract PRG(b_i). No client reveals both shares for one client and round, so no update is ever without a
mask.

The secrets are split with Shamir's scheme over a prime field. Beside its letters a client sends hashes of the
secrets and of every share. So a receiver sees at once that a letter holds another share, and the server sees who
reveals another share than the one in the letter, or has split another secret than the one that it masks with.

Source: Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, 2017, figure 4, with
signed keys where sites have certificates, and with a signed word of each client on its partners in the place of the
round of signatures on the list of survivors.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from parablock.errors import CodecError
from parablock.privacy.keystream import KEY_BYTES, Keystream, derive

Words = np.ndarray[tuple[int], np.dtype[np.uint32]]
"""Integers modulo 2^32."""

PRIME = 2**256 + 297
"""The smallest prime above 2^256; secret shares are numbers below it."""
SHARE_BYTES = 33
NO_SHARE = b"\xff" * SHARE_BYTES
"""In the place of a share that a client has not got; no share, because it is above the prime."""
COMMITMENT_BYTES = 16
PIECE = 1 << 15
"""Words that are masked at a time."""


@dataclass(frozen=True)
class Cohorts:
    """The cohorts (ascending) of the future rounds, which secrets are made for."""

    num_clients: int
    of_round: Mapping[int, tuple[int, ...]]

    def rounds_of(self, *clients: int) -> list[int]:
        """Return the rounds in which all of these clients take part."""
        return [t for t, cohort in self.of_round.items() if set(clients) <= set(cohort)]

    def place_of(self, client_id: int, round_index: int) -> int:
        """Return the index of a round's key among a client's keys; key 0 is for letters."""
        return 1 + self.rounds_of(client_id).index(round_index)

    def num_key_bytes(self, client_id: int) -> int:
        """Return the length of a client's public keys."""
        return KEY_BYTES * (1 + len(self.rounds_of(client_id)))

    def num_letter_bytes(self, sender: int, receiver: int) -> int:
        """Return the length of a letter's content: two shares for each common round."""
        return 2 * SHARE_BYTES * len(self.rounds_of(sender, receiver))


def new_private_key() -> bytes:
    """Draw an X25519 private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Return the public key of a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree_key(private: bytes, public: bytes, *purpose: str | int) -> bytes:
    """Return the key that two sides agree on for a purpose.

    Raises:
        CodecError: The public key is invalid.
    """
    try:
        exchanged = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise CodecError(
            f"{public.hex()} is no public key: {error}",
            cause="The key was changed on its way, or somebody tries to read the masked updates.",
            remedy="Start the run again; if it happens again, do not trust the server.",
        ) from None
    return derive(exchanged, *purpose)


@dataclass(frozen=True)
class Mask:
    """A mask, whose words are made when they are added."""

    stream: Keystream
    is_negative: bool = False


def pair_mask(private: bytes, public: bytes, round_index: int, client_id: int, other: int) -> Mask:
    """Return the mask of a client for its pair with another client, whose own mask is the negative.

    The keys are those of this round: the private one of either client, and the public one of the other.
    """
    low, high = sorted((client_id, other))
    return Mask(Keystream(agree_key(private, public, "pair", round_index, low, high)), client_id != low)


def own_mask(seed: bytes) -> Mask:
    """Return a client's own mask."""
    return Mask(Keystream(derive(seed, "own")))


def add_masks(words: Words, masks: Sequence[Mask]) -> Words:
    """Add masks to words modulo 2^32, in their place: all of them to one piece after the other."""
    for first in range(0, len(words), PIECE):
        piece = words[first : first + PIECE]
        for mask in masks:
            (np.subtract if mask.is_negative else np.add)(piece, mask.stream.words(len(piece)), out=piece)
    return words


def commit(round_index: int, dealer: int, holder: int, content: bytes) -> bytes:
    """Return the hash by which a dealer is bound to a holder's share; its own secret has the holder −1."""
    place = f"parablock share\n{round_index}\n{dealer}\n{holder}\n".encode()
    return sha256(place + content).digest()[:COMMITMENT_BYTES]


def seal(key: bytes, sender: int, receiver: int, content: bytes) -> bytes:
    """Encrypt the one letter of a client to another under one key."""
    return ChaCha20Poly1305(derive(key, sender, receiver)).encrypt(bytes(12), content, None)


def unseal(key: bytes, sender: int, receiver: int, letter: bytes) -> bytes:
    """Decrypt a letter.

    Raises:
        InvalidTag: The letter is not as the sender wrote it.
    """
    return ChaCha20Poly1305(derive(key, sender, receiver)).decrypt(bytes(12), letter, None)


def split_secret(secret: bytes, num_shares: int, threshold: int) -> list[bytes]:
    """Split a secret of 32 bytes; share i, from 0, is the polynomial's value at i + 1."""
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, num_shares + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def join_secret(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret from at least as many shares, by their numbers from 0, as the threshold.

    Raises:
        ValueError: The shares yield no secret of 32 bytes; not every wrong share is detected.
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
