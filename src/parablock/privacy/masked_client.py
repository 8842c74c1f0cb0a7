"""The client's side of secure aggregation: it masks updates in the communication thread.

The compute thread hands over fixed-point updates and never sees messages of the protocol. So masks take no time
from training, and a snapshot holds the plain update.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from cryptography.exceptions import InvalidTag

from parablock.errors import CodecError
from parablock.privacy import masking
from parablock.privacy.keystream import KEY_BYTES, new_key
from parablock.privacy.masking import SHARE_BYTES, Cohorts
from parablock.privacy.protection import threshold_of
from parablock.wire import sealing
from parablock.wire.messages import Update, from_bytes, kind_of, to_bytes
from parablock.wire.quantize import pack
from parablock.wire.sealing import SEALING_KINDS, pack_bytes, unpack_bytes
from parablock.wire.transport import Parcel


class MaskedClient:
    """One client's secrets and its part of the protocol, for the cohorts of future rounds."""

    def __init__(self, client_id: int, cohorts: Cohorts) -> None:
        self._client_id, self._cohorts = client_id, cohorts
        self._rounds = cohorts.rounds_of(client_id)
        self._first = min(cohorts.of_round, default=0)
        self._letter_key = masking.new_private_key()
        self._mask_keys = {t: masking.new_private_key() for t in self._rounds}
        self._seeds = {t: new_key() for t in self._rounds}
        self._public: list[list[bytes]] = []
        self._kept: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        """For each (round, client): this client's shares of the other's seed and key."""
        self._revealed: dict[int, tuple[int, ...]] = {}
        self._held: list[Parcel] | None = []
        """Updates that wait for the keys of the others; None once the keys are there."""

    def opening(self) -> list[Parcel]:
        """Return the first messages of this client."""
        if self._public:  # the client was gone and is back
            return []
        keys = [self._letter_key, *self._mask_keys.values()]
        content = b"".join(masking.public_key(key) for key in keys)
        return [Parcel(to_bytes(sealing.Advertise(self._client_id, pack_bytes(content))), self._first)]

    def outgoing(self, parcel: Parcel) -> list[Parcel]:
        """Return a message with its update masked, or keep it until the keys are there."""
        if self._held is None:
            return [self._mask(parcel)]
        self._held.append(parcel)
        return []

    def incoming(self, parcel: Parcel) -> list[Parcel] | None:
        """Return the answers to a message of the protocol; None for any other message.

        Raises:
            CodecError: The server asks for forbidden shares, or a letter cannot be read.
        """
        if kind_of(parcel.message) not in SEALING_KINDS:
            return None
        message = from_bytes(parcel.message)
        match message:
            case sealing.Roster():
                return [Parcel(to_bytes(self._seal_shares(message)), self._first)]
            case sealing.Letters():
                self._read(message)
                held, self._held = self._held or [], None
                return [self._mask(waiting) for waiting in held]
            case sealing.Reveal():
                return [Parcel(to_bytes(self._answer_reveal(message)), message.round_index)]
        return None

    def _seal_shares(self, roster: sealing.Roster) -> sealing.Shares:
        content, end = unpack_bytes(roster.keys), 0
        for client_id in range(self._cohorts.num_clients):
            begin, end = end, end + KEY_BYTES * (1 + len(self._cohorts.rounds_of(client_id)))
            self._public.append([content[k : k + KEY_BYTES] for k in range(begin, end, KEY_BYTES)])
        letters: list[list[bytes]] = [[] for _ in range(self._cohorts.num_clients)]
        for t in self._rounds:
            cohort = self._cohorts.of_round[t]
            threshold = threshold_of(len(cohort))
            seeds = masking.split_secret(self._seeds[t], len(cohort), threshold)
            keys = masking.split_secret(self._mask_keys[t], len(cohort), threshold)
            for other, seed, key in zip(cohort, seeds, keys, strict=True):
                letters[other] += [seed, key]
        self._keep(self._client_id, b"".join(letters[self._client_id]))
        sealed = [
            masking.seal(self._letter_key_with(other), self._client_id, other, b"".join(letters[other]))
            for other in range(self._cohorts.num_clients)
            if other != self._client_id
        ]
        return sealing.Shares(self._client_id, tuple(map(len, sealed)), pack_bytes(b"".join(sealed)))

    def _read(self, message: sealing.Letters) -> None:
        content, end = unpack_bytes(message.letters), 0
        others = [other for other in range(self._cohorts.num_clients) if other != self._client_id]
        if len(message.letter_bytes) != len(others):
            raise CodecError(
                f"client {self._client_id} got {len(message.letter_bytes)} letters from {len(others)} clients",
                cause="The server runs another configuration.",
            )
        for other, size in zip(others, message.letter_bytes, strict=True):
            begin, end = end, end + size
            key = self._letter_key_with(other)
            try:
                self._keep(other, masking.unseal(key, other, self._client_id, content[begin:end]))
            except InvalidTag:
                raise CodecError(
                    f"client {self._client_id} cannot read the letter of client {other}",
                    cause="The letter was changed on its way, or one of the clients restarted with other keys.",
                    remedy="Start the run again; if it happens again, do not trust the server.",
                ) from None

    def _keep(self, other: int, content: bytes) -> None:
        for place, t in enumerate(self._cohorts.rounds_of(self._client_id, other)):
            begin = 2 * place * SHARE_BYTES
            shares = content[begin : begin + 2 * SHARE_BYTES]
            self._kept[t, other] = shares[:SHARE_BYTES], shares[SHARE_BYTES:]

    def _letter_key_with(self, other: int) -> bytes:
        return masking.agree_key(self._letter_key, self._public[other][0], "letters")

    def _mask(self, parcel: Parcel) -> Parcel:
        if kind_of(parcel.message) != "Update":
            return parcel
        message = from_bytes(parcel.message)
        assert isinstance(message, Update)
        t, size = message.round_index, message.delta.num_elements
        masks = [masking.own_mask(self._seeds[t], size)]
        for other in self._cohorts.of_round[t]:
            if other != self._client_id:
                public = self._public[other][self._cohorts.place_of(other, t)]
                masks.append(masking.pair_mask(self._mask_keys[t], public, t, self._client_id, other, size))
        words = message.delta.values.numpy().view(np.uint32)
        masked = torch.from_numpy(masking.add_words([words, *masks], size).view(np.int32))
        return replace(parcel, message=to_bytes(replace(message, delta=pack(masked, "word32"))))

    def _answer_reveal(self, message: sealing.Reveal) -> sealing.Revealed:
        t, clients = message.round_index, message.clients
        cohort = self._cohorts.of_round.get(t, ())
        before = self._revealed.setdefault(t, clients)
        if before != clients or not set(clients) <= set(cohort) or len(clients) < threshold_of(len(cohort)):
            raise CodecError(
                f"client {self._client_id} was asked to reveal the sum of clients {clients} in round {t}, after "
                f"{before}, of {cohort}",
                cause="The server asks for two sums of one round, or for one of too few.",
                remedy="Two sums would reveal a single update; do not trust this server.",
            )
        shares = [self._kept[t, other][0 if other in clients else 1] for other in cohort]
        return sealing.Revealed(t, self._client_id, pack_bytes(b"".join(shares)))
