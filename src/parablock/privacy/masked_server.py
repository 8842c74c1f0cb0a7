"""The server's side of secure aggregation: it forwards keys and letters, and computes the masks of sums.

It wraps the server's transport and handles the messages of the protocol, which the server never sees. All clients
that take part get all keys and letters before the first other message of a run. A client that does not send its own
in time takes part in no round of the session; nobody waits for it.

Each message of a client is accepted once, in its turn, under its own name. Any other is refused and counted. Keys
count if the client has signed them, where clients have certificates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from parablock.clock import Clock
from parablock.errors import CodecError, MaskingError
from parablock.privacy import masking
from parablock.privacy.identities import Identity, is_proven, signed_keys, signed_partners, unbelieved
from parablock.privacy.keystream import KEY_BYTES
from parablock.privacy.masked_client import Fixed
from parablock.privacy.masking import COMMITMENT_BYTES, NO_SHARE, SHARE_BYTES, Cohorts, Mask
from parablock.privacy.protection import threshold_of
from parablock.wire import sealing
from parablock.wire.messages import Message, from_bytes, kind_of, to_bytes
from parablock.wire.sealing import SEALING_KINDS, cut, pack_bytes, unpack_bytes
from parablock.wire.transport import Ledger, Parcel, PutAside, ServerTransport

MAX_PROOF_BYTES, TAG_BYTES = 16 << 10, 16
"""Longest signature; what sealing adds to a letter."""


class MaskedServer:
    """The server's end of a transport, for masked updates: it wraps the transport `inner`.

    Args:
        inner: The transport.
        cohorts: The drawn cohorts of the rounds to come.
        fixed: Keeps of which clients' updates a round's sum is.
        clock: The run's clock.
        most_kept_bytes: How much of a client's other messages is kept while a step of the protocol is waited for.
        stall_timeout_s: Seconds until a step of the protocol goes on without the clients that have not answered.
        identity: Checks the clients' signatures; None: nobody has certificates.
        context: The session that a signature is for.

    Attributes:
        on_refusal: Called with (client, reason in a word, end of the sentence "client 3 sent …").
    """

    def __init__(
        self,
        inner: ServerTransport,
        cohorts: Cohorts,
        fixed: Fixed,
        clock: Clock,
        *,
        stall_timeout_s: float,
        most_kept_bytes: int,
        identity: Identity | None = None,
        context: str = "",
    ) -> None:
        self._inner, self._cohorts, self._stall_timeout_s = inner, cohorts, stall_timeout_s
        self._identity, self._context, self._fixed, self._clock = identity, context, fixed, clock
        self._first, self._waiting = min(cohorts.of_round, default=0), PutAside(most_kept_bytes)
        self._advertised: dict[int, sealing.Advertise] = {}
        self._roster: tuple[int, ...] | None = None
        self._letters: dict[int, dict[int, bytes]] = {}
        self._members: tuple[int, ...] | None = None
        self._restarted: set[int] = set()
        """Members that have advertised other keys since: their secrets are gone."""
        self._gone: set[int] = set()
        """Clients that have said that they leave: no answer of theirs is waited for."""
        self._left_out: set[int] = set()
        """Members whose secrets have made a round void: the others mask with them no more."""
        self._partners: dict[tuple[int, int], sealing.Partners] = {}
        """For each (round, client): whom its update is masked with."""
        self._commitments: dict[tuple[int, int], list[bytes]] = {}
        self._asked: tuple[int, frozenset[int]] | None = None
        self._late: set[tuple[int, int]] = set()  # (round, client): asked for shares, and others were enough
        self._revealed: dict[int, list[bytes]] = {}
        self.on_refusal: Callable[[int, str, str], None] = lambda *_: None

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
        return self._waiting.take()

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        """Wait for the next message outside the protocol; None if the clock reaches `deadline_s` first."""
        self._begin()
        while not self._waiting:
            if (received := self._inner.receive_until(deadline_s, from_clients)) is None:
                return None
            self._take(*received)
        return self._waiting.take()

    @property
    def members(self) -> tuple[int, ...]:
        """The clients that can take part, after the exchange of keys."""
        self._begin()
        return tuple(i for i in self._members or () if i not in self._restarted | self._left_out)

    def leave_out(self, client_id: int) -> None:
        """Let the others mask with a client no more."""
        if client_id not in self._left_out:
            self._left_out.add(client_id)
            for member in self.members:
                self._inner.send(member, Parcel(to_bytes(sealing.LeaveOut(client_id)), self._first))

    def unfit(self, round_index: int, clients: Sequence[int]) -> dict[int, str]:
        """Return the clients whose updates cannot be in a sum of masked ones, each with what is wrong with it."""
        left = {i: "an update of one that nobody masks with any more" for i in clients if i in self._left_out}
        without = [i for i in clients if (round_index, i) not in self._partners]
        return left | dict.fromkeys(without, "an update without word of whom it is masked with")

    def fixed_set(self, round_index: int, clients: tuple[int, ...]) -> tuple[int, ...]:
        """Return the clients of whose updates the round's sum has to be: these, unless others were fixed before."""
        return self._fixed.fix("set", round_index, clients)

    def masks_of(self, round_index: int, clients: Sequence[int], size: int) -> Tensor:
        """Return the sum of the masks of these clients' updates, once in a round: 1-D, int32, `size` words.

        The clients are those whose updates have come, and of which none is `unfit`; at least all but a third of
        the cohort.

        Raises:
            MaskingError: Too few clients have revealed shares, or a client is at fault, which is named.
        """
        t, chosen, cohort = round_index, tuple(sorted(clients)), self._cohorts.of_round[round_index]
        members = [i for i in cohort if i in (self._members or ())]
        if not set(chosen) <= set(members) or len(chosen) < threshold_of(len(cohort)):
            raise MaskingError(f"a sum of clients {chosen} of {cohort} in round {t + 1} is one of too few")
        if problems := self.unfit(t, chosen):
            raise MaskingError(f"round {t + 1}: a sum with {'; '.join(f'{p} ({i})' for i, p in problems.items())}")
        if (fixed := self.fixed_set(t, chosen)) != chosen:
            raise MaskingError(f"the sum of round {t + 1} was begun for clients {fixed}, and {chosen} are there")
        pairs = {i: [j for j in chosen if i not in self._partners[t, j].left_out] for i in members}
        dealers = [dealer for dealer in members if pairs[dealer]]
        self._reveal(t, chosen, members, dealers)
        self._fixed.record("shares", t, clients=tuple(sorted(self._good())), of=chosen)
        masks: list[Mask] = []
        for dealer in dealers:
            secret = self._secret_of(t, dealer, cohort, is_seed=dealer in chosen)
            if dealer in chosen:
                masks.append(masking.own_mask(secret))
                continue
            for other in pairs[dealer]:  # their pair masks with the client whose update is missing
                masks.append(masking.pair_mask(secret, self._key(other, t), t, other, dealer))
        self._revealed = {}
        sum_ = masking.add_masks(np.zeros(size, np.uint32), masks)
        return torch.from_numpy(sum_.view(np.int32))

    def _reveal(self, t: int, chosen: tuple[int, ...], members: Sequence[int], dealers: Sequence[int]) -> None:
        """Ask for shares of the dealers' secrets, until there are enough, or no more will come."""
        self._asked, self._revealed = (t, frozenset(chosen)), {}
        message = to_bytes(self.question(t, chosen))
        for client_id in members:
            self._inner.send(client_id, Parcel(message, t))
        cohort = self._cohorts.of_round[t]
        threshold = threshold_of(len(cohort))
        self._wait_for(
            members, self._revealed, lambda: all(len(self._shares_of(i, cohort)) >= threshold for i in dealers)
        )
        self._asked, self._late = None, self._late | {(t, i) for i in members if i not in self._revealed}
        if len(self._good()) < threshold:
            raise MaskingError(
                f"{len(self._good())} clients have revealed shares of round {t + 1}, of {threshold} that it takes",
                cause="The others are gone, or refuse: their own logs say why.",
            )

    def question(self, round_index: int, clients: tuple[int, ...]) -> sealing.Reveal:
        """Return what asks for the shares of a sum."""
        said = [self._partners[round_index, i] for i in clients]
        proofs = [unpack_bytes(each.proof) for each in said]
        left_out = tuple(each.left_out for each in said)
        return sealing.Reveal(round_index, clients, left_out, tuple(map(len, proofs)), pack_bytes(b"".join(proofs)))

    def _good(self) -> dict[int, list[bytes]]:
        return {i: shares for i, shares in self._revealed.items() if shares}

    def _shares_of(self, dealer: int, cohort: tuple[int, ...]) -> dict[int, bytes]:
        """Return what has been revealed of a client's secret: number of the share → share."""
        place = cohort.index(dealer)
        shares = {cohort.index(i): found[place] for i, found in sorted(self._good().items())}
        return {number: share for number, share in shares.items() if share != NO_SHARE}

    def _secret_of(self, t: int, dealer: int, cohort: tuple[int, ...], *, is_seed: bool) -> bytes:
        """Return a client's seed or key of a round from the shares that were revealed."""
        shares, threshold = self._shares_of(dealer, cohort), threshold_of(len(cohort))
        if len(shares) < threshold:
            without = len(self._good()) - len(shares)
            is_named = without > len(cohort) - threshold  # else they may be the ones who lie
            known = f"Client {dealer} sent the others letters that they could not use."
            unknown = f"Too few say that they have none ({without}) to blame client {dealer}; others are silent."
            raise MaskingError(
                f"{len(shares)} clients have a share of client {dealer}'s secret of round {t + 1}, of {threshold}",
                cause=known if is_named else unknown,
                client_id=dealer if is_named else None,
            )
        try:
            secret = masking.join_secret(dict(list(shares.items())[:threshold]))
            own = self._commitments[t, dealer][0]
            if is_seed:
                fits = masking.commit(t, dealer, -1, secret) == own
            else:
                fits = masking.public_key(secret) == self._key(dealer, t)
        except ValueError:
            fits = False
        if not fits:
            raise MaskingError(
                f"the shares of client {dealer}'s secret of round {t + 1} do not fit together",
                cause=f"Client {dealer} has split another secret than the one that it masks with.",
                client_id=dealer,
            )
        return secret

    def _begin(self) -> None:
        """Give all clients all keys, then all letters."""
        if self._members is not None:
            return
        self._wait_for(range(self._cohorts.num_clients), self._advertised)
        self._roster = roster = tuple(sorted(self._advertised))
        keys = [unpack_bytes(self._advertised[i].keys) for i in roster]
        proofs = [unpack_bytes(self._advertised[i].proof) for i in roster]
        lengths = (tuple(map(len, keys)), tuple(map(len, proofs)))
        message = sealing.Roster(roster, *lengths, pack_bytes(b"".join(keys)), pack_bytes(b"".join(proofs)))
        for client_id in roster:
            self._inner.send(client_id, Parcel(to_bytes(message), self._first))
        self._wait_for(roster, self._letters)
        faults = unbelieved(self._letters, self._cohorts.num_clients)
        for client_id, fault in faults.items():
            self.on_refusal(client_id, "misfit", fault)
        self._members = tuple(sorted(self._letters.keys() - faults.keys()))
        for client_id in self._members:
            senders = tuple(sender for sender in self._members if sender != client_id)
            letters = [self._letters[sender][client_id] for sender in senders]
            commitments = [self._commitments_for(sender, client_id) for sender in senders]
            letters_of = sealing.Letters(
                senders, tuple(map(len, letters)), pack_bytes(b"".join(letters)), pack_bytes(b"".join(commitments))
            )
            self._inner.send(client_id, Parcel(to_bytes(letters_of), self._first))

    def _wait_for(
        self, clients: Collection[int], came: Collection[int], is_enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Take messages until these clients have answered or left, or their time is over."""
        deadline_s = self._clock.now() + self._stall_timeout_s
        while (missing := [i for i in clients if i not in came and i not in self._gone]) and not is_enough():
            if self._clock.now() >= deadline_s or not (got := self._inner.receive_until(deadline_s, missing)):
                return
            self._take(*got)

    def _take(self, client_id: int, raw: bytes) -> None:
        if (kind := kind_of(raw)) not in SEALING_KINDS:
            self._gone |= {client_id} if kind == "Leave" else set()
            if not self._waiting.put(client_id, raw):
                self.on_refusal(client_id, "duplicate", f"a {kind} more than there is room for")
            return
        try:
            message: Message = from_bytes(raw)
        except CodecError as error:
            self.on_refusal(client_id, "corrupt", f"a message that cannot be decoded: {error.what}")
            return
        if getattr(message, "client_id", client_id) != client_id:
            self.on_refusal(client_id, "foreign", f"a {type(message).__name__} in the name of another client")
            return
        match message:
            case sealing.Advertise() if self._roster is None and client_id not in self._advertised:
                problem = self._take_keys(client_id, message)
            case sealing.Advertise() if client_id in (self._members or ()) and client_id not in self._restarted:
                self._restarted.add(client_id)
                problem = "new keys: its secrets are gone, and masks with them"
            case sealing.Shares() if client_id in (self._roster or ()) and self._members is None:
                problem = self._take_shares(client_id, message)
            case sealing.Partners():
                problem = self._take_partners(client_id, message)
            case sealing.Revealed() if self._asked and message.round_index == self._asked[0]:
                problem = self._take_revealed(client_id, message)
            case sealing.Revealed() if (message.round_index, client_id) in self._late:
                self._late, problem = self._late - {(message.round_index, client_id)}, ""
            case _:
                self.on_refusal(client_id, "duplicate", f"a {type(message).__name__} that nobody waits for")
                return
        if problem:
            self.on_refusal(client_id, "misfit", problem)

    def _take_keys(self, client_id: int, message: sealing.Advertise) -> str:
        due = self._cohorts.num_key_bytes(client_id)
        if message.keys.num_elements != due or message.proof.num_elements > MAX_PROOF_BYTES:
            return f"{message.keys.num_elements} bytes of keys where {due} are due"
        keys = cut(message.keys, [KEY_BYTES] * (due // KEY_BYTES))
        others = {
            unpack_bytes(other.keys)[k : k + KEY_BYTES]
            for other in self._advertised.values()
            for k in range(0, other.keys.num_elements, KEY_BYTES)
        }
        if len(set(keys) - others) < len(keys):
            return "a key that stands twice"
        try:  # one that is none would end the part of every client that reads it
            for key in keys:
                masking.agree_key(masking.new_private_key(), key, "check")
        except CodecError as error:
            return error.what
        content = signed_keys(self._context, client_id, unpack_bytes(message.keys))
        if not is_proven(self._identity, client_id, content, unpack_bytes(message.proof)):
            return "keys that it has not signed"
        self._advertised[client_id] = message
        return ""

    def _take_shares(self, client_id: int, message: sealing.Shares) -> str:
        if client_id in self._letters:
            return "its shares once more"
        others = [other for other in self._roster or () if other != client_id]
        rounds = self._cohorts.rounds_of(client_id)
        hashes = {t: 1 + 2 * len(self._cohorts.of_round[t]) for t in rounds}
        due = [self._cohorts.num_letter_bytes(client_id, other) + TAG_BYTES for other in others]
        lengths = list(message.letter_bytes)  # 0: it does not believe that member's keys
        fits = len(lengths) == len(due) and all(n in (0, full) for n, full in zip(lengths, due, strict=True))
        if not fits or message.letters.num_elements != sum(lengths):
            return "letters of another length than the configuration gives"
        if message.commitments.num_elements != COMMITMENT_BYTES * sum(hashes.values()):
            return "hashes of shares of another length than the configuration gives"
        pieces = iter(cut(message.commitments, [COMMITMENT_BYTES] * sum(hashes.values())))
        for t, count in hashes.items():
            self._commitments[t, client_id] = [next(pieces) for _ in range(count)]
        self._letters[client_id] = dict(zip(others, cut(message.letters, lengths), strict=True))
        return ""

    def _take_partners(self, client_id: int, message: sealing.Partners) -> str:
        t, cohort = message.round_index, self._cohorts.of_round.get(message.round_index, ())
        if client_id not in cohort or client_id not in (self._members or ()):
            return f"word of whom it masks with in round {t + 1}, in which it takes no part"
        before = self._partners.get((t, client_id))
        if before is not None:  # an update that is sent again has the same partners
            return "" if before.left_out == message.left_out else f"two words of its partners in round {t + 1}"
        there = set(self._members or ()) - self._left_out
        if not set(message.left_out) <= set(cohort) - there:
            return f"word that it masks in round {t + 1} without {message.left_out}, of which some take part"
        keys = unpack_bytes(self._advertised[client_id].keys)
        content = signed_partners(self._context, client_id, keys, t, message.left_out)
        if message.proof.num_elements > MAX_PROOF_BYTES or not is_proven(
            self._identity, client_id, content, unpack_bytes(message.proof)
        ):
            return f"word of whom it masks with in round {t + 1} that it has not signed"
        self._partners[t, client_id] = message
        return ""

    def _take_revealed(self, client_id: int, message: sealing.Revealed) -> str:
        assert self._asked is not None
        t, chosen = self._asked
        cohort = self._cohorts.of_round[t]
        if client_id not in cohort or client_id not in (self._members or ()) or client_id in self._revealed:
            return f"shares of round {t + 1} that nobody waits for"
        size = message.shares.num_elements
        if size not in (0, SHARE_BYTES * len(cohort)):
            return f"{size} bytes of shares where {SHARE_BYTES * len(cohort)} are due"
        shares = cut(message.shares, [SHARE_BYTES] * (size // SHARE_BYTES))
        self._revealed[client_id] = []
        for dealer, share in zip(cohort, shares, strict=False):
            if dealer in (self._members or ()) and share != NO_SHARE:
                bound = self._bound_to(t, dealer, client_id, is_seed=dealer in chosen)
                if masking.commit(t, dealer, client_id, share) != bound:
                    return f"a false share of client {dealer}'s secret of round {t + 1}; none of its shares counts"
        self._revealed[client_id] = shares
        return ""

    def _bound_to(self, t: int, dealer: int, holder: int, *, is_seed: bool) -> bytes:
        return self._commitments[t, dealer][1 + 2 * self._cohorts.of_round[t].index(holder) + (not is_seed)]

    def _commitments_for(self, dealer: int, holder: int) -> bytes:
        rounds = self._cohorts.rounds_of(dealer, holder)
        both = [self._bound_to(t, dealer, holder, is_seed=is_seed) for t in rounds for is_seed in (True, False)]
        return b"".join(both)

    def _key(self, client_id: int, round_index: int) -> bytes:
        begin = KEY_BYTES * self._cohorts.place_of(client_id, round_index)
        return unpack_bytes(self._advertised[client_id].keys)[begin : begin + KEY_BYTES]
