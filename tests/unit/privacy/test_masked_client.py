"""With whom a client masks: the others know it before they help to take masks off, and a liar is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from engines import follow, server_plan
from masked_wires import MaskedWires
from message_sequences import masked_update
from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.clock import VirtualClock
from parablock.engine.update_form import FixedPointWords
from parablock.errors import MaskingError
from parablock.privacy import masking
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.masked_server import MaskedServer
from parablock.privacy.masking import (
    NO_SHARE,
    SHARE_BYTES,
    add_masks,
    join_secret,
    own_mask,
    pair_mask,
)
from parablock.privacy.protection import Protection
from parablock.privacy.secure_aggregation import SecureAggregation
from parablock.trace import Trace
from parablock.wire.messages import Mark, Update, from_bytes, to_bytes
from parablock.wire.sealing import Letters, Partners, Reveal, cut, pack_bytes, unpack_bytes
from parablock.wire.transport import Parcel
from toy import ToyTrainer, initial


def begin(wires: MaskedWires) -> None:
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))


def send(wires: MaskedWires, clients: tuple[int, ...], round_index: int = 0) -> dict[int, np.ndarray]:
    """Let clients send an update of a round; return their words as the server gets them."""
    for client_id in clients:
        wires.upload(client_id, masked_update(client_id, round_index), round_index)
    came = {}
    while (received := wires.collector.receive_until(1.0)) is not None:
        update = from_bytes(received[1])
        if isinstance(update, Update):
            came[received[0]] = update.delta.values.numpy().view(np.uint32)
    return came


def only_from_client_1(letters: Letters) -> Letters:
    """Keep the letter of client 1 alone."""
    place = letters.clients.index(1)
    letter = cut(letters.letters, letters.letter_bytes)[place]
    each = letters.commitments.num_elements // len(letters.clients)
    commitments = cut(letters.commitments, [each] * len(letters.clients))[place]
    return Letters((1,), (len(letter),), pack_bytes(letter), pack_bytes(commitments))


def sum_of_client_0_alone(lie: Callable[[Reveal], Reveal]) -> tuple[bool, list[str]]:
    """Give client 0 of three one partner, and ask for a sum without that one: is its update seen?"""
    wires = MaskedWires(3, {0: (0, 1, 2)})
    passed = wires.send

    def send_few(client_id: int, parcel: Parcel) -> None:
        if client_id == 0 and isinstance(message := from_bytes(parcel.message), Letters):
            parcel = Parcel(to_bytes(only_from_client_1(message)), 0)
        passed(client_id, parcel)

    wires.send = send_few  # type: ignore[method-assign]
    begin(wires)
    came = send(wires, (0, 1, 2))
    seeds, keys = {}, {}
    for i in (1, 2):
        (answer,) = wires.couriers[i].incoming(Parcel(to_bytes(lie(wires.asking(0, (0, 2)))), 0))
        shares = unpack_bytes(from_bytes(answer.message).shares)
        if shares and shares[:SHARE_BYTES] != NO_SHARE:
            seeds[i] = shares[:SHARE_BYTES]
            keys[i] = shares[SHARE_BYTES : 2 * SHARE_BYTES]
    if len(seeds) < 2:
        return False, wires.told
    own, public = join_secret(seeds), wires.couriers[0]._public
    pair = pair_mask(join_secret(keys), public[0][1], 0, 1, 0)
    negative = replace(pair, is_negative=not pair.is_negative)
    masks = add_masks(np.zeros(len(came[0]), np.uint32), [own_mask(own), negative])
    plain = from_bytes(masked_update(0, 0)).delta.values.numpy().view(np.uint32)
    return bool((came[0] == masks + plain).all()), wires.told


def test_a_client_that_is_given_few_partners_is_in_no_sum_without_them(monkeypatch: pytest.MonkeyPatch):
    seen, told = sum_of_client_0_alone(lambda asked: asked)
    assert not seen
    assert "of which client 0 does not mask with all" in told[-1]
    monkeypatch.setattr(MaskedClient, "_not_among_themselves", lambda *_: "")
    assert sum_of_client_0_alone(lambda asked: asked)[0], "the hole that was: nobody had to collude"


def test_a_sum_needs_the_word_of_each_of_its_clients():
    for lie in (
        lambda asked: replace(asked, left_out=asked.left_out[:1]),
        lambda asked: replace(asked, proof_bytes=()),
        lambda asked: replace(asked, left_out=((2,), ())),
    ):
        seen, told = sum_of_client_0_alone(lie)
        assert not seen
        assert told[-1].startswith("client 2 refuses")


def test_an_update_without_word_of_its_partners_is_in_no_sum_and_the_others_are_exact():
    wires = MaskedWires(4, {0: (0, 1, 2, 3)})
    begin(wires)
    for client_id, courier in enumerate(wires.couriers):
        parcels = courier.outgoing(Parcel(masked_update(client_id, 0), 0))
        wires._take(client_id, [p for p in parcels if client_id != 3 or b'"Partners"' not in p.message])
    came = send(wires, ())
    assert list(wires.collector.unfit(0, (0, 1, 2, 3))) == [3]
    total = came[0] + came[1] + came[2] - wires.collector.masks_of(0, (0, 1, 2), 6).numpy().view(np.uint32)
    assert (total == 1000 * (0 + 1 + 2)).all()
    with pytest.raises(MaskingError, match="without word of whom it is masked with"):
        wires.collector.masks_of(0, (0, 1, 2, 3), 6)


@pytest.mark.parametrize(
    ("word", "refused"),
    [
        (Partners(0, 3, (1,), pack_bytes(b"")), "some take part"),
        (Partners(7, 3, (), pack_bytes(b"")), "takes no part"),
        (Partners(0, 2, (), pack_bytes(b"")), "another client"),
    ],
)
def test_a_word_that_cannot_be_is_refused(word: Partners, refused: str):
    wires = MaskedWires(4, {0: (0, 1, 2, 3)})
    begin(wires)
    wires._take(3, [Parcel(to_bytes(word), 0)])
    send(wires, (0, 1, 2, 3))
    ((who, _, words),) = wires.refused
    assert who == 3 and refused in words
    assert not wires.collector.unfit(0, (0, 1, 2, 3)), "its true word counts"


def test_a_question_whose_proofs_are_of_another_length_is_refused_and_ends_nothing():
    wires = MaskedWires(3, {0: (0, 1, 2)})
    begin(wires)
    send(wires, (0, 1, 2))
    asked = wires.asking(0, (0, 1, 2))
    answers = []
    for question in (replace(asked, proof_bytes=(5, 0, 0)), asked):
        (answer,) = wires.couriers[1].incoming(Parcel(to_bytes(question), 0))
        answers.append(from_bytes(answer.message).shares.num_elements)
    assert answers == [0, 3 * SHARE_BYTES]
    assert len(wires.told) == 1 and "pieces of 5 together" in wires.told[0]


@dataclass
class Doubting:
    """Believes everybody but one."""

    doubted: int

    def sign(self, content: bytes) -> bytes:
        return b""

    def is_by(self, client_id: int, content: bytes, proof: bytes) -> bool:
        return client_id != self.doubted


@pytest.mark.parametrize(("doubters", "members"), [(1, range(1, 8)), (2, range(2, 8)), (3, range(7))])
def test_whom_more_than_a_third_do_not_believe_is_out_and_else_those_who_say_so(doubters: int, members: range):
    identities = [Doubting(7) if i < doubters else None for i in range(9)]
    wires = MaskedWires(8, {0: tuple(range(8))}, identities=identities)
    begin(wires)
    assert wires.collector.members == tuple(members)
    assert {client_id for client_id, _, _ in wires.refused} == set(range(8)) - set(members)
    came = send(wires, tuple(members))
    total = sum(came.values()) - wires.collector.masks_of(0, tuple(members), 6).numpy().view(np.uint32)
    assert (total == 1000 * sum(members)).all()


def dealing_falsely(monkeypatch: pytest.MonkeyPatch, liar: int) -> None:
    """Let a client send the others letters that they cannot use."""
    honest = masking.seal

    def seal(key: bytes, sender: int, receiver: int, content: bytes) -> bytes:
        return honest(key, sender, receiver, bytes(len(content)) if sender == liar else content)

    monkeypatch.setattr(masking, "seal", seal)


def test_after_a_void_round_the_others_mask_without_the_one_who_dealt_falsely(monkeypatch: pytest.MonkeyPatch):
    dealing_falsely(monkeypatch, 1)
    for is_left_out in (True, False):
        wires = MaskedWires(4, dict.fromkeys(range(3), (0, 1, 2, 3)))
        begin(wires)
        send(wires, (0, 1, 2, 3), 0)
        early = send(wires, (0, 2), 1)  # already masked with client 1
        with pytest.raises(MaskingError, match="could not use") as error:
            wires.collector.masks_of(0, (0, 1, 2, 3), 6)
        assert error.value.client_id == 1
        if not is_left_out:
            send(wires, (0, 2, 3), 2)
            with pytest.raises(MaskingError, match="could not use"):  # and so it was for every round to come
                wires.collector.masks_of(2, (0, 2, 3), 6)
            continue
        wires.collector.leave_out(1)
        assert "masks with client 1 no more" in wires.told[-1]
        assert wires.collector.members == (0, 2, 3)
        assert list(wires.collector.unfit(0, (0, 1))) == [1]
        early |= send(wires, (3,), 1)
        with pytest.raises(MaskingError, match="could not use"):
            wires.collector.masks_of(1, (0, 2, 3), 6)
        wires.collector.leave_out(1)
        came = send(wires, (0, 2, 3), 2)
        total = came[0] + came[2] + came[3] - wires.collector.masks_of(2, (0, 2, 3), 6).numpy().view(np.uint32)
        assert (total == 1000 * (0 + 2 + 3)).all()


@pytest.mark.parametrize("delay", [0, 1])
def test_one_who_deals_falsely_costs_the_rounds_under_way_and_no_later_one(
    delay: int, monkeypatch: pytest.MonkeyPatch
):
    def run() -> list[list[int]]:
        form = FixedPointWords(FixedPointGrid(2.0, 4))
        plan = server_plan(4, 5, delay, form, min_updates=3)
        trainers = [ToyTrainer(i, i + 1) for i in range(4)]
        masked = SecureAggregation(4, 5, 1.0, 0, 20.0)
        options = {"protection_of": lambda _: Protection(2.0), "masking": masked}
        return follow(initial(3), trainers, plan, Trace(VirtualClock()), **options).counted

    assert run() == [[0, 1, 2, 3]] * 5
    dealing_falsely(monkeypatch, 1)
    counted = run()
    assert 1 <= counted.count([]) <= 1 + delay
    assert counted[counted.count([]) :] == [[0, 2, 3]] * (5 - counted.count([]))
    monkeypatch.setattr(MaskedServer, "leave_out", lambda *_: None)
    assert run() == [[]] * 5, "the hole that was"
