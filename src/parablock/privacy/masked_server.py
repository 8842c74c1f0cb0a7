"""The server's side of secure aggregation: it forwards keys and letters, and computes the masks of sums.

It wraps the server's transport and handles the messages of the protocol, which the server never sees. All clients
get all keys and letters before the first other message of a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from parablock.errors import CodecError
from parablock.privacy import masking
from parablock.privacy.keystream import KEY_BYTES
from parablock.privacy.masking import SHARE_BYTES, Cohorts
from parablock.privacy.protection import threshold_of
from parablock.wire import sealing
from parablock.wire.messages import Message, from_bytes, kind_of, to_bytes
from parablock.wire.sealing import SEALING_KINDS, pack_bytes, unpack_bytes
from parablock.wire.transport import Ledger, Parcel, ServerTransport


class MaskedServer:
    """The server's end of a transport, for masked updates: it wraps the transport `inner`.

    `stall_timeout_s` is the patience, in seconds without progress of the protocol, until a StallError.
    """

    def __init__(self, inner: ServerTransport, cohorts: Cohorts, *, stall_timeout_s: float) -> None:
        self._inner, self._cohorts, self._stall_timeout_s = inner, cohorts, stall_timeout_s
        self._first = min(cohorts.of_round, default=0)
        self._keys: dict[int, bytes] = {}
        self._shares: dict[int, sealing.Shares] = {}
        self._revealed: dict[int, dict[int, bytes]] = {}
        self._waiting = deque[tuple[int, bytes]]()
        self._has_begun = False

    @property
    def ledger(self) -> Ledger:
        """Bytes and seconds, the protocol's included."""
        return self._inner.ledger

    def is_there(self, client_id: int) -> bool:
        """Ask the transport."""
        return self._inner.is_there(client_id)

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Send a message to a client, after the exchange of keys."""
        self._begin()
        self._inner.send(client_id, parcel)

    def receive(
        self, timeout_s: float, waiting_for: str, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        """Wait for the next message outside the protocol."""
        self._begin()
        while not self._waiting:
            self._take(*self._inner.receive(timeout_s, waiting_for, from_clients))
        return self._waiting.popleft()

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        """Wait for the next message outside the protocol; None if the clock reaches `deadline_s` first."""
        self._begin()
        while not self._waiting:
            received = self._inner.receive_until(deadline_s, from_clients)
            if received is None:
                return None
            self._take(*received)
        return self._waiting.popleft()

    def masks_of(self, round_index: int, clients: Sequence[int], size: int) -> Tensor:
        """Return the sum of the masks of these clients' updates, once in a round: 1-D, int32, `size` words.

        The clients are those whose updates have come; at least all but a third of the cohort.

        Raises:
            StallError: Too few clients answer.
            CodecError: Their shares do not fit together.
        """
        cohort = self._cohorts.of_round[round_index]
        revealed = self._revealed.setdefault(round_index, {})
        message = to_bytes(sealing.Reveal(round_index, tuple(clients)))
        for client_id in cohort:
            self._inner.send(client_id, Parcel(message, round_index))
        while len(revealed) < threshold_of(len(cohort)):
            self._receive(f"the mask shares of round {round_index}, which {len(revealed)} clients have revealed")
        shares = dict(sorted(revealed.items())[: threshold_of(len(cohort))])
        parts = []
        for place, client_id in enumerate(cohort):
            begin = place * SHARE_BYTES
            own_shares = {cohort.index(i): content[begin : begin + SHARE_BYTES] for i, content in shares.items()}
            try:
                secret = masking.join_secret(own_shares)
            except ValueError:
                raise _unfit(client_id) from None
            if client_id in clients:
                parts.append(masking.own_mask(secret, size))
                continue
            if masking.public_key(secret) != self._key(client_id, round_index):
                raise _unfit(client_id)
            for other in clients:  # their pair masks with the client whose update is missing
                public = self._key(other, round_index)
                parts.append(masking.pair_mask(secret, public, round_index, other, client_id, size))
        return torch.from_numpy(masking.add_words(parts, size).view(np.int32))

    def _begin(self) -> None:
        """Give all clients all keys, then all letters."""
        if self._has_begun:
            return
        all_clients = range(self._cohorts.num_clients)
        while missing := [i for i in all_clients if i not in self._keys]:
            self._receive(f"the keys of clients {', '.join(map(str, missing))}")
        roster = to_bytes(sealing.Roster(pack_bytes(b"".join(self._keys[i] for i in all_clients))))
        for client_id in all_clients:
            self._inner.send(client_id, Parcel(roster, self._first))
        while missing := [i for i in all_clients if i not in self._shares]:
            self._receive(f"the shares of clients {', '.join(map(str, missing))}")
        for client_id in all_clients:
            letters = [self._letter(sender, client_id) for sender in all_clients if sender != client_id]
            message = sealing.Letters(tuple(map(len, letters)), pack_bytes(b"".join(letters)))
            self._inner.send(client_id, Parcel(to_bytes(message), self._first))
        self._has_begun = True

    def _receive(self, waiting_for: str) -> None:
        self._take(*self._inner.receive(self._stall_timeout_s, waiting_for))

    def _take(self, client_id: int, raw: bytes) -> None:
        if kind_of(raw) not in SEALING_KINDS:
            self._waiting.append((client_id, raw))
            return
        message: Message = from_bytes(raw)
        match message:
            case sealing.Advertise() if len(unpack_bytes(message.keys)) == self._num_key_bytes(client_id):
                self._keys.setdefault(client_id, unpack_bytes(message.keys))
            case sealing.Shares() if len(message.letter_bytes) == self._cohorts.num_clients - 1:
                self._shares.setdefault(client_id, message)
            case sealing.Revealed() if message.round_index in self._revealed:
                cohort = self._cohorts.of_round[message.round_index]
                content = unpack_bytes(message.shares)
                if client_id in cohort and len(content) == SHARE_BYTES * len(cohort):
                    self._revealed[message.round_index].setdefault(client_id, content)
            case _:
                raise CodecError(
                    f"client {client_id} sent a message of kind {type(message).__name__} that does not fit",
                    cause="The client runs another configuration than the server.",
                    remedy="Give all clients the same configuration.",
                )

    def _num_key_bytes(self, client_id: int) -> int:
        return KEY_BYTES * (1 + len(self._cohorts.rounds_of(client_id)))

    def _letter(self, sender: int, receiver: int) -> bytes:
        shares = self._shares[sender]
        place = receiver - (receiver > sender)
        begin = sum(shares.letter_bytes[:place])
        return unpack_bytes(shares.letters)[begin : begin + shares.letter_bytes[place]]

    def _key(self, client_id: int, round_index: int) -> bytes:
        begin = KEY_BYTES * self._cohorts.place_of(client_id, round_index)
        return self._keys[client_id][begin : begin + KEY_BYTES]


def _unfit(client_id: int) -> CodecError:
    return CodecError(
        f"the shares of client {client_id}'s secret do not fit together",
        cause="A client sent wrong shares, or the letters were changed on their way.",
        remedy="Start the run again; the client at fault cannot be identified.",
    )
