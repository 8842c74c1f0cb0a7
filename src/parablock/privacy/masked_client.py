"""The client's side of secure aggregation: it masks updates in the communication thread.

The compute thread hands over fixed-point updates and never sees messages of the protocol. So masks take no time
from training, and a snapshot holds the plain update.

Each message of the protocol is accepted once, in its turn: `Roster`, then `Letters`, then one `Reveal` a round. Any
other is refused, counted and told, and changes nothing. A roster or letters that do not hold what they must end the
client's part: without them it can mask nothing. A member whose proof is false is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import torch
from cryptography.exceptions import InvalidTag

from parablock.errors import CodecError
from parablock.privacy import masking
from parablock.privacy.identities import Identity, is_proven, signed_keys, signed_partners
from parablock.privacy.keystream import KEY_BYTES, new_key
from parablock.privacy.masking import COMMITMENT_BYTES, NO_SHARE, SHARE_BYTES, Cohorts
from parablock.privacy.protection import threshold_of
from parablock.wire import sealing
from parablock.wire.messages import Skip, Update, from_bytes, kind_of, to_bytes
from parablock.wire.quantize import Vector, pack
from parablock.wire.sealing import SEALING_KINDS, cut, pack_bytes
from parablock.wire.transport import Parcel


class Fixed(Protocol):
    """What a client or the server has to keep beyond its own life: see `ReleaseLedger`."""

    def fix(self, kind: str, round_index: int, clients: tuple[int, ...]) -> tuple[int, ...]:
        """Record the set of a round, unless one is there; return the one that holds."""

    def record(self, kind: str, round_index: int, **facts: Any) -> None:
        """Record what is released, unless it is there."""


class MaskedClient:
    """One client's secrets and its part of the protocol, for the cohorts of future rounds.

    Args:
        client_id: The client.
        cohorts: The drawn cohorts of the rounds to come.
        revealed: Keeps for which set of clients it has given shares in a round.
        identity: Signs this client's keys, and checks those of the others; None: nobody has certificates.
        context: The session that a signature is for.
        tell: Gets a line for each refused message.
    """

    def __init__(
        self,
        client_id: int,
        cohorts: Cohorts,
        revealed: Fixed,
        *,
        identity: Identity | None = None,
        context: str = "",
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._client_id, self._cohorts, self._revealed = client_id, cohorts, revealed
        self._identity, self._context, self._tell = identity, context, tell
        self._rounds = cohorts.rounds_of(client_id)
        self._first = min(cohorts.of_round, default=0)
        self._letter_key = masking.new_private_key()
        self._mask_keys = {t: masking.new_private_key() for t in self._rounds}
        self._seeds = {t: new_key() for t in self._rounds}
        self._opened = False
        self._public: dict[int, list[bytes]] = {}
        """The public keys of each member; empty until the roster comes."""
        self._members: tuple[int, ...] | None = None
        """The clients to mask with; None until the letters come."""
        self._kept: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        """For each (round, client): this client's shares of the other's seed and key."""
        self._masked: dict[int, bytes] = {}
        """The hash of the one update of each round that this client has masked."""
        self._partners: dict[int, sealing.Partners] = {}
        """What this client has said of its partners in a round, once."""
        self._held: list[Parcel] = []
        """Updates that wait for the letters."""
        self.refused = Counter[str]()

    def opening(self) -> list[Parcel]:
        """Return the first messages of this client."""
        if self._opened:  # the client was gone and is back
            return []
        self._opened = True
        keys = self._own_keys()
        proof = self._sign(signed_keys(self._context, self._client_id, keys))
        return [self._first_parcel(sealing.Advertise(self._client_id, pack_bytes(keys), proof))]

    def outgoing(self, parcel: Parcel) -> list[Parcel]:
        """Return a message with its update masked, or keep it until the keys are there."""
        if kind_of(parcel.message) != "Update":
            return [parcel]
        if self._members is None:
            self._held.append(parcel)
            return []
        return self._mask(parcel)

    def incoming(self, parcel: Parcel) -> list[Parcel] | None:
        """Return the answers to a message of the protocol; None for any other message.

        Raises:
            CodecError: The roster or the letters are not what they must be.
        """
        if kind_of(parcel.message) not in SEALING_KINDS:
            return None
        try:
            message = from_bytes(parcel.message)
        except CodecError as error:
            return self._refuse(f"a message that cannot be decoded: {error.what}")
        match message:
            case sealing.Roster() if self._opened and not self._public:
                return [self._first_parcel(self._seal_shares(message))]
            case sealing.Letters() if self._public and self._members is None:
                self._read(message)
                held, self._held = self._held, []
                return [masked for waiting in held for masked in self._mask(waiting)]
            case sealing.Reveal():
                return self._answer_reveal(message)
            case sealing.LeaveOut(client_id=named) if named in (self._members or ()) and named != self._client_id:
                self._members = tuple(other for other in self._members or () if other != named)
                self._tell(f"client {self._client_id} masks with client {named} no more: its secrets do not fit")
                return []
        return self._refuse(f"a {type(message).__name__} out of its turn")

    def _refuse(self, problem: str) -> list[Parcel]:
        self.refused["masking"] += 1
        self._tell(f"client {self._client_id} refuses what the server sent: {problem}")
        return []

    def _first_parcel(self, message: sealing.Sealing) -> Parcel:
        return Parcel(to_bytes(message), self._first)

    def _own_keys(self) -> bytes:
        return b"".join(masking.public_key(key) for key in (self._letter_key, *self._mask_keys.values()))

    def _sign(self, content: bytes) -> Vector:
        return pack_bytes(b"" if self._identity is None else self._identity.sign(content))

    # ── before the first round ──────────────────────────────────────────────────────────────────────

    def _seal_shares(self, roster: sealing.Roster) -> sealing.Shares:
        self._read_roster(roster)
        letters: dict[int, list[bytes]] = {other: [] for other in range(self._cohorts.num_clients)}
        commitments: list[bytes] = []
        for t in self._rounds:
            cohort = self._cohorts.of_round[t]
            threshold = threshold_of(len(cohort))
            seeds = masking.split_secret(self._seeds[t], len(cohort), threshold)
            keys = masking.split_secret(self._mask_keys[t], len(cohort), threshold)
            commitments.append(masking.commit(t, self._client_id, -1, self._seeds[t]))
            for other, *shares in zip(cohort, seeds, keys, strict=True):
                letters[other] += shares
                commitments += [masking.commit(t, self._client_id, other, share) for share in shares]
        self._keep(self._client_id, b"".join(letters[self._client_id]))
        sealed = [
            masking.seal(self._letter_key_with(other), self._client_id, other, b"".join(letters[other]))
            if other in self._public
            else b""
            for other in roster.clients
            if other != self._client_id
        ]
        lengths = tuple(map(len, sealed))
        return sealing.Shares(
            self._client_id, lengths, pack_bytes(b"".join(sealed)), pack_bytes(b"".join(commitments))
        )

    def _read_roster(self, roster: sealing.Roster) -> None:
        if not len(roster.clients) == len(roster.key_bytes) == len(roster.proof_bytes):
            raise self._unfit("a roster whose lists differ in length")
        public = {}
        all_keys, proofs = cut(roster.keys, roster.key_bytes), cut(roster.proofs, roster.proof_bytes)
        for client_id, keys, proof in zip(roster.clients, all_keys, proofs, strict=True):
            if client_id >= self._cohorts.num_clients or len(keys) != self._cohorts.num_key_bytes(client_id):
                raise self._unfit(f"{len(keys)} bytes as the keys of client {client_id}")
            if not is_proven(self._identity, client_id, signed_keys(self._context, client_id, keys), proof):
                self._refuse(f"keys of client {client_id} that it has not signed; it is left out")
                continue
            public[client_id] = [keys[k : k + KEY_BYTES] for k in range(0, len(keys), KEY_BYTES)]
        if b"".join(public.get(self._client_id, ())) != self._own_keys():
            raise self._unfit("a roster in which this client's keys are not its own")
        all_public = [key for keys in public.values() for key in keys]
        if len(set(all_public)) != len(all_public):
            raise self._unfit("a roster in which a key stands twice")
        for client_id in public:
            if client_id != self._client_id:  # every key is one, or nothing is sealed
                masking.agree_key(self._letter_key, public[client_id][0], "letters")
        self._public = public

    def _read(self, message: sealing.Letters) -> None:
        senders = message.clients
        common = {other: len(self._cohorts.rounds_of(self._client_id, other)) for other in senders}
        if self._client_id in senders or not set(senders) <= set(self._public):
            raise self._unfit(f"letters of clients {senders}")
        if len(message.letter_bytes) != len(senders):
            raise self._unfit(f"{len(message.letter_bytes)} letters from {len(senders)} clients")
        lengths = [2 * COMMITMENT_BYTES * common[other] for other in senders]
        letters, commitments = cut(message.letters, message.letter_bytes), cut(message.commitments, lengths)
        for other, letter, committed in zip(senders, letters, commitments, strict=True):
            self._open(other, letter, committed)
        self._members = tuple(sorted((*senders, self._client_id)))

    def _open(self, other: int, letter: bytes, committed: bytes) -> None:
        """Keep the shares in a letter, if they are those that their dealer is bound to."""
        try:
            content = masking.unseal(self._letter_key_with(other), other, self._client_id, letter)
        except InvalidTag:
            self._refuse(f"the letter of client {other}, which cannot be read")
            return
        shares = [content[k : k + SHARE_BYTES] for k in range(0, len(content), SHARE_BYTES)]
        rounds = [t for t in self._cohorts.rounds_of(self._client_id, other) for _ in range(2)]
        own = [masking.commit(t, other, self._client_id, share) for t, share in zip(rounds, shares, strict=False)]
        if len(content) != self._cohorts.num_letter_bytes(other, self._client_id) or b"".join(own) != committed:
            self._refuse(f"the letter of client {other}, whose shares are not those that it is bound to")
            return
        self._keep(other, content)

    def _keep(self, other: int, content: bytes) -> None:
        for place, t in enumerate(self._cohorts.rounds_of(self._client_id, other)):
            begin = 2 * place * SHARE_BYTES
            shares = content[begin : begin + 2 * SHARE_BYTES]
            self._kept[t, other] = shares[:SHARE_BYTES], shares[SHARE_BYTES:]

    def _letter_key_with(self, other: int) -> bytes:
        return masking.agree_key(self._letter_key, self._public[other][0], "letters")

    def _unfit(self, found: str) -> CodecError:
        return CodecError(
            f"the server gave client {self._client_id} {found}",
            cause="The server runs another configuration, or tries to read masked updates.",
            remedy="Give server and sites the same configuration; if it happens again, do not trust the server.",
        )

    # ── in a round ──────────────────────────────────────────────────────────────────────────────────

    def _mask(self, parcel: Parcel) -> list[Parcel]:
        message = from_bytes(parcel.message)
        assert isinstance(message, Update) and self._members is not None
        t = message.round_index
        cohort = self._cohorts.of_round.get(t, ())
        said = self._partners.get(t) or self._say_partners(t, cohort)
        partners = [other for other in cohort if other not in said.left_out]
        if self._client_id not in cohort or len(partners) < threshold_of(len(cohort)):
            self._refuse(f"round {t + 1}, in which {len(partners)} of {len(cohort)} clients can mask")
            return [replace(parcel, message=to_bytes(Skip(t)))]
        content = sha256(message.delta.raw.numpy().data).digest()
        if self._masked.setdefault(t, content) != content:
            self._refuse(f"round {t + 1} once more: a mask covers one update")
            return [replace(parcel, message=to_bytes(Skip(t)))]
        masks = [masking.own_mask(self._seeds[t])]
        for other in partners:
            if other != self._client_id:
                public = self._public[other][self._cohorts.place_of(other, t)]
                masks.append(masking.pair_mask(self._mask_keys[t], public, t, self._client_id, other))
        words = masking.add_masks(message.delta.values.numpy().view(np.uint32), masks)  # those decoded here
        self._partners[t] = said
        hidden = to_bytes(replace(message, delta=pack(torch.from_numpy(words.view(np.int32)), "word32")))
        return [replace(parcel, message=to_bytes(said)), replace(parcel, message=hidden)]

    def _say_partners(self, t: int, cohort: tuple[int, ...]) -> sealing.Partners:
        left_out = tuple(other for other in cohort if other not in (self._members or ()))
        content = signed_partners(self._context, self._client_id, self._own_keys(), t, left_out)
        return sealing.Partners(t, self._client_id, left_out, self._sign(content))

    def _answer_reveal(self, message: sealing.Reveal) -> list[Parcel]:
        """Return the shares for a sum; none, in words, if it is not one that the server may have."""
        t, clients = message.round_index, message.clients
        problem = self._forbidden(message)
        shares: list[bytes] = []
        if problem:
            self._refuse(f"it asks for the sum of clients {clients} in round {t + 1}, {problem}")
        else:
            kept = {other: self._kept.get((t, other)) for other in self._cohorts.of_round[t]}
            shares = [NO_SHARE if two is None else two[other not in clients] for other, two in kept.items()]
        return [Parcel(to_bytes(sealing.Revealed(t, self._client_id, pack_bytes(b"".join(shares)))), t)]

    def _forbidden(self, message: sealing.Reveal) -> str:
        """Return why the server may not have a sum; empty if it may."""
        t, clients = message.round_index, message.clients
        cohort = self._cohorts.of_round.get(t, ())
        if self._members is None or self._client_id not in cohort:
            return "in which this client takes no part"
        if not set(clients) <= set(cohort) or len(set(clients)) < threshold_of(len(cohort)):
            return f"which is one of too few, or of others than {cohort}"
        if self._client_id in clients and t not in self._masked:
            return "in which this client has sent nothing"
        if problem := self._not_among_themselves(message):
            return problem
        if (before := self._revealed.fix("reveal", t, clients)) != clients:
            return f"after that of clients {before}; two sums would reveal a single update"
        return ""

    def _not_among_themselves(self, message: sealing.Reveal) -> str:
        """Return why these clients may not all have masked with each other; empty if they have.

        Else the server could give a client few partners, and ask the others for a sum of it without them.
        """
        t, clients = message.round_index, message.clients
        if not len(clients) == len(message.left_out) == len(message.proof_bytes):
            return "without their word of whom they mask with"
        try:
            proofs = cut(message.proofs, message.proof_bytes)
        except CodecError as error:
            return f"with {error.what}"
        for client_id, left_out, proof in zip(clients, message.left_out, proofs, strict=True):
            own = self._partners[t].left_out if client_id == self._client_id else left_out
            if client_id not in self._public or left_out != own or not set(left_out).isdisjoint(clients):
                return f"of which client {client_id} does not mask with all"
            keys = b"".join(self._public[client_id])
            content = signed_partners(self._context, client_id, keys, t, left_out)
            if not is_proven(self._identity, client_id, content, proof):
                return f"with a word of client {client_id} that it has not signed"
        return ""
