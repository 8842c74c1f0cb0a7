"""Secure aggregation: sums on a grid, masks that cancel, shares for those who drop, and what a server can see."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from masked_wires import MaskedWires
from parablock.algorithm.fixed_point import FixedPointAggregation, FixedPointGrid
from parablock.algorithm.robust import Rule, aggregate_by
from parablock.engine.round_fold import RoundFold
from parablock.engine.update_form import Differences, FixedPointWords
from parablock.errors import CodecError, MaskingError
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.masking import (
    NO_SHARE,
    PRIME,
    SHARE_BYTES,
    Cohorts,
    add_masks,
    join_secret,
    own_mask,
    pair_mask,
    split_secret,
)
from parablock.privacy.protection import threshold_of
from parablock.storage.release_ledger import ReleaseLedger
from parablock.wire.messages import Leave, Mark, Update, from_bytes, to_bytes
from parablock.wire.quantize import Encoding, pack
from parablock.wire.sealing import Advertise, Letters, Revealed, Roster, pack_bytes, unpack_bytes
from parablock.wire.transport import MESSAGE_BYTES, Parcel

SIZE = 1000


def deltas(num_clients: int, size: int = SIZE, norm: float = 0.5) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {i: torch.randn(size, generator=generator) for i in range(num_clients)}
    return {i: norm * delta / delta.norm() for i, delta in drawn.items()}


def update(client_id: int, words: torch.Tensor, round_index: int = 0) -> bytes:
    return to_bytes(Update(round_index, 0, client_id, 7, -1, 0.5, 1, 0.1, 0, 1, pack(words, "word32")))


def words_of(raw: bytes) -> torch.Tensor:
    message = from_bytes(raw)
    assert isinstance(message, Update)
    return message.delta.values


def masked_sum(num_clients: int, dropping: tuple[int, ...], *, silent: tuple[int, ...] = ()) -> torch.Tensor:
    """Let all but those who drop send masked words, and give the aggregate of the others."""
    grid, everybody = FixedPointGrid(1.0, num_clients), tuple(range(num_clients))
    wires = MaskedWires(num_clients, {0: everybody, 1: everybody})
    sent = {i: grid.encode(delta) for i, delta in deltas(num_clients).items() if i not in dropping}
    for client_id, words in sent.items():
        wires.upload(client_id, update(client_id, words))
    came = {}
    for _ in sent:
        client_id, raw = wires.collector.receive(1.0, "updates")
        came[client_id] = words_of(raw), 7
        assert not torch.equal(came[client_id][0], sent[client_id])
    wires.silent = set(silent)
    aggregation = FixedPointAggregation(grid, Rule())
    aggregation.masks = wires.collector.masks_of(0, sorted(came), SIZE + 1)
    return aggregation.fold(came)


def plain_sum(num_clients: int, dropping: tuple[int, ...]) -> torch.Tensor:
    grid = FixedPointGrid(1.0, num_clients)
    kept = {i: (grid.encode(delta), 7) for i, delta in deltas(num_clients).items() if i not in dropping}
    return FixedPointAggregation(grid, Rule()).fold(kept)


# -- the grid ---------------------------------------------------------------------------------------------------


def test_a_sum_of_as_many_updates_as_there_are_clients_never_leaves_32_bits():
    for num_clients in (3, 8, 1000):
        grid = FixedPointGrid(2.0, num_clients)
        assert num_clients * grid.levels < 2**31 <= (num_clients + 1) * (grid.levels + 1)
        largest = grid.encode(torch.tensor([2.0, -2.0, 2.1]))
        assert largest[:3].tolist() == [grid.levels, -grid.levels, grid.levels]


def test_the_grid_is_finer_than_what_the_mean_needs_and_knows_rho():
    updates = {i: (delta, 1) for i, delta in deltas(8).items()}
    grid = FixedPointGrid(4.0, 8)
    aggregation = FixedPointAggregation(grid, Rule())
    mean = aggregation.fold({i: (grid.encode(delta), n) for i, (delta, n) in updates.items()})
    exact = aggregate_by(Rule(), updates)
    assert float((mean - exact.mean_delta).norm() / exact.mean_delta.norm()) < 1e-5
    assert aggregation.aggregate().rho == pytest.approx(exact.rho, rel=1e-5)
    words = grid.encode(updates[3][0])
    assert float((grid.decode(words) - updates[3][0]).abs().max()) <= 0.5001 * grid.step
    assert torch.equal(grid.encode(grid.decode(words))[:-1], words[:-1])


def test_every_client_counts_once_and_noise_is_that_of_the_mean():
    grid, updates = FixedPointGrid(1.0, 3), {i: (delta, 10**i) for i, delta in deltas(3).items()}
    words = {i: (grid.encode(delta), n) for i, (delta, n) in updates.items()}
    mean = FixedPointAggregation(grid, Rule(clip_norm=1.0)).fold(words)
    assert torch.allclose(mean, sum(delta for delta, _ in updates.values()) / 3, atol=1e-7)
    noisy = FixedPointAggregation(grid, Rule(clip_norm=1.0, noise_multiplier=0.6), lambda *_: torch.ones)
    assert torch.allclose(noisy.fold(words), mean + 0.6 / 3)


# -- secrets in shares ------------------------------------------------------------------------------------------


def test_any_shares_up_to_the_threshold_give_the_secret_back_and_fewer_do_not():
    secret = bytes(range(32))
    shares = dict(enumerate(split_secret(secret, 5, 3)))
    for chosen in combinations(range(5), 3):
        assert join_secret({number: shares[number] for number in chosen}) == secret
    assert join_secret(shares) == secret
    few = {number: shares[number] for number in (0, 4)}
    with suppress(ValueError):  # what they give is seldom even 32 bytes
        assert join_secret(few) != secret
    assert split_secret(secret, 5, 3) != list(shares.values())
    assert all(len(share) == SHARE_BYTES for share in shares.values())


def test_the_modulus_is_prime_and_above_every_secret():
    # Fermat's test with several bases, which the next odd number but one does not pass
    assert 2**256 < PRIME < 2**257
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))
    assert pow(2, PRIME + 1, PRIME + 2) != 1
    assert join_secret(dict(enumerate(split_secret(b"\xff" * 32, 3, 2)))) == b"\xff" * 32


# -- the protocol -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropping", [(), (2,), (0, 7)], ids=["nobody drops", "one drops", "two drop"])
def test_the_masked_sum_is_bitwise_the_plain_one_whoever_drops(dropping: tuple[int, ...]):
    assert torch.equal(masked_sum(8, dropping), plain_sum(8, dropping))
    assert not torch.equal(plain_sum(8, dropping), plain_sum(8, (3,)))


def test_a_third_may_be_gone_when_secrets_are_revealed_and_no_more():
    assert threshold_of(8) == 6
    assert torch.equal(masked_sum(8, (0, 7), silent=(0, 7)), plain_sum(8, (0, 7)))
    assert torch.equal(masked_sum(8, (), silent=(1, 2)), plain_sum(8, ()))
    with pytest.raises(MaskingError, match="5 clients have revealed"):
        masked_sum(8, (), silent=(1, 2, 3))


def test_an_update_waits_until_its_masks_are_known_and_other_messages_pass():
    wires = MaskedWires(3, {4: (0, 1, 2)})
    wires.upload(1, update(1, torch.zeros(5, dtype=torch.int32), 4), 4)  # before anybody has anybody's keys
    assert not any(b'"Update"' in raw for raw in wires.seen)
    wires.collector.send(0, Parcel(to_bytes(Mark(4, False)), 4))
    assert wires.to_compute == [to_bytes(Mark(4, False))]
    assert wires.collector.receive(1.0, "the update")[0] == 1
    assert wires.collector.receive_until(1.0) is None


def began(num_clients: int, cohorts: dict[int, tuple[int, ...]]) -> MaskedWires:
    """Exchange keys and letters, and let everybody send an update of every round."""
    wires = MaskedWires(num_clients, cohorts)
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
    for t in cohorts:
        send_zeros(wires, t)
    return wires


def test_what_a_client_sends_while_keys_are_exchanged_is_kept_as_far_as_there_is_room():
    wires = MaskedWires(4, {0: (0, 1, 2, 3)})
    large = update(2, torch.zeros(50_000, dtype=torch.int32))
    wires._up.extendleft([(2, large)] * 20)
    wires._up.append((1, large))
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
    refused = [told for told in wires.refused if told[:2] == (2, "duplicate")]
    kept = [wires.collector.receive(1.0, "")[0] for _ in range(21 - len(refused))]
    assert 0 < len(refused) < 20 and kept.count(1) == 1
    assert (kept.count(2) - 1) * len(large) <= 1 << 20 < (kept.count(2) + 1) * (len(large) + MESSAGE_BYTES)
    wires._up.append((2, large))
    assert wires.collector.receive(1.0, "") == (2, large), "there is room again"


def send_zeros(wires: MaskedWires, round_index: int = 0) -> None:
    """Let everybody send an update of a round."""
    for client_id in range(len(wires.couriers)):
        wires.upload(client_id, update(client_id, torch.zeros(SIZE, dtype=torch.int32), round_index), round_index)


def came(wires: MaskedWires) -> dict[int, np.ndarray]:
    """Let the server take what has come; return the words of each update."""
    found = {}
    while (received := wires.collector.receive_until(1.0)) is not None:
        found[received[0]] = words_of(received[1]).numpy().view(np.uint32)
    return found


def shares_for(wires: MaskedWires, client_id: int, clients: tuple[int, ...]) -> int:
    """Ask for shares of round 0; return how many bytes come."""
    (answer,) = wires.couriers[client_id].incoming(Parcel(to_bytes(wires.asking(0, clients)), 0))
    return from_bytes(answer.message).shares.num_elements


def test_a_client_reveals_one_sum_of_a_round_and_none_of_few():
    everybody = tuple(range(4))
    for first, second in (((0, 1, 2, 3), (0, 1, 2)), ((0, 1), None), ((0, 1, 2, 9), None)):
        wires = began(4, {0: everybody})
        asked = [clients for clients in (first, second) if clients is not None]
        for clients in asked[:-1]:
            assert shares_for(wires, 1, clients) == 4 * SHARE_BYTES
            assert shares_for(wires, 1, clients), "the same question again is harmless"
        assert not wires.told
        assert shares_for(wires, 1, asked[-1]) == 0
        assert "asks for the sum" in wires.told[0]


def test_a_client_that_has_sent_nothing_reveals_no_sum_with_itself():
    wires = MaskedWires(4, {0: (0, 1, 2, 3)})
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
    assert shares_for(wires, 1, (0, 1, 2, 3)) == 0
    assert shares_for(wires, 1, (0, 2, 3)) == 4 * SHARE_BYTES


def test_a_client_of_which_few_others_can_mask_sends_nothing():
    known = Cohorts(6, {0: tuple(range(6))})
    wires = MaskedWires(6, dict(known.of_round))
    for keep, sends in ((range(6), "Update"), (range(4), "Update"), (range(3), "Skip")):
        couriers = [MaskedClient(i, known, ReleaseLedger()) for i in range(6)]
        opened = {i: from_bytes(couriers[i].opening()[0].message) for i in keep}
        keys = [unpack_bytes(message.keys) for message in opened.values()]
        lengths = tuple(map(len, keys))
        roster = Roster(tuple(keep), lengths, (0,) * len(keys), pack_bytes(b"".join(keys)), pack_bytes(b""))
        sealed = [from_bytes(couriers[i].incoming(Parcel(to_bytes(roster), 0))[0].message) for i in keep]
        size = len(unpack_bytes(sealed[1].letters)) // (len(keys) - 1)
        letters = [unpack_bytes(each.letters)[:size] for each in sealed[1:]]
        hashes = [unpack_bytes(each.commitments)[16:48] for each in sealed[1:]]
        others = Letters(
            tuple(keep)[1:], tuple(map(len, letters)), pack_bytes(b"".join(letters)), pack_bytes(b"".join(hashes))
        )
        couriers[0].incoming(Parcel(to_bytes(others), 0))
        *_, sent = couriers[0].outgoing(Parcel(update(0, torch.zeros(5, dtype=torch.int32)), 0))
        assert type(from_bytes(sent.message)).__name__ == sends
    assert wires.couriers[0].refused == couriers[1].refused == {}


def lying(wires: MaskedWires, liar: int, change) -> None:
    """Let a client answer with other shares than those that it holds."""
    honest = wires.couriers[liar].incoming

    def forged(parcel: Parcel) -> list[Parcel] | None:
        answers = honest(parcel)
        if not answers or not isinstance(message := from_bytes(answers[0].message), Revealed):
            return answers
        shares = bytearray(unpack_bytes(message.shares))
        change(shares)
        return [Parcel(to_bytes(Revealed(message.round_index, liar, pack_bytes(bytes(shares)))), 0)]

    wires.couriers[liar].incoming = forged  # type: ignore[method-assign]


def flip(shares: bytearray) -> None:
    shares[SHARE_BYTES + 5] ^= 1


def test_who_reveals_a_false_share_is_named_and_the_sum_is_exact_without_it():
    wires = began(8, {0: tuple(range(8))})
    lying(wires, 5, flip)
    wires.silent = {0}  # two of eight need not answer
    honest = began(8, {0: tuple(range(8))})
    sums = {}
    for name, each in (("lying", wires), ("honest", honest)):
        masked = [each.collector.receive(1.0, "") for _ in range(8)]
        chosen = [1, 2, 3, 4, 6, 7]
        total = sum(words_of(raw).numpy().view(np.uint32) for client_id, raw in masked if client_id in chosen)
        sums[name] = total - each.collector.masks_of(0, chosen, SIZE).numpy().view(np.uint32)
    assert not sums["lying"].any() and not sums["honest"].any(), "the sum of zeros"
    assert [(who, why) for who, why, _ in wires.refused] == [(5, "misfit")]
    assert "a false share of client 1's secret" in wires.refused[0][2]
    assert not honest.refused


def test_with_too_few_honest_shares_the_round_is_void_and_the_liar_named():
    wires = began(8, {0: tuple(range(8))})
    lying(wires, 5, flip)
    wires.silent = {0, 7}
    came(wires)
    with pytest.raises(MaskingError, match="5 clients have revealed"):
        wires.collector.masks_of(0, (1, 2, 3, 4, 5, 6), SIZE)
    assert wires.refused[0][0] == 5


def has_none_of_client_0(shares: bytearray) -> None:
    shares[:SHARE_BYTES] = NO_SHARE


def test_a_third_who_say_that_they_have_no_share_make_a_round_void_and_blame_nobody():
    for liars, blamed in (((1,), None), ((1, 2), 0)):  # more than a third are believed
        wires = began(3, {0: (0, 1, 2)})
        for liar in liars:
            lying(wires, liar, has_none_of_client_0)
        wires.silent = {2} - set(liars)
        came(wires)
        with pytest.raises(MaskingError, match="1 clients have a share of client 0's secret") as error:
            wires.collector.masks_of(0, (0, 1, 2), SIZE)
        assert error.value.client_id == blamed


def test_who_has_split_another_secret_than_its_own_is_named(monkeypatch: pytest.MonkeyPatch):
    wires = MaskedWires(3, {0: (0, 1, 2)})
    true = wires.couriers[1]._seeds[0]
    wires.couriers[1]._seeds[0] = bytes(32)  # it masks with this one, and binds itself to it …
    honest = split_secret

    def split(secret: bytes, num_shares: int, threshold: int) -> list[bytes]:
        return honest(true if secret == bytes(32) else secret, num_shares, threshold)  # … and splits another

    monkeypatch.setattr("parablock.privacy.masking.split_secret", split)
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
    send_zeros(wires)
    came(wires)
    with pytest.raises(MaskingError, match="client 1's secret of round 1 do not fit") as error:
        wires.collector.masks_of(0, (0, 1, 2), SIZE)
    assert error.value.client_id == 1


def changing(wires: MaskedWires, kind: str, change) -> None:
    """Let the server change messages of a kind on their way to client 0."""
    passed = wires.send

    def changed(client_id: int, parcel: Parcel) -> None:
        if f'"{kind}"'.encode() in parcel.message and client_id == 0:
            parcel = Parcel(to_bytes(change(from_bytes(parcel.message))), 0)
        passed(client_id, parcel)

    wires.send = changed  # type: ignore[method-assign]


def altered(vector, at: int):
    content = bytearray(unpack_bytes(vector))
    content[at] ^= 1
    return pack_bytes(bytes(content))


@pytest.mark.parametrize("field", ["letters", "commitments"])
def test_a_letter_that_was_changed_is_told_and_its_shares_are_missing_alone(field: str):
    wires = MaskedWires(3, {0: (0, 1, 2)})
    changing(wires, "Letters", lambda letters: replace(letters, **{field: altered(getattr(letters, field), 3)}))
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
    assert "the letter of client 1" in wires.told[0]
    send_zeros(wires)
    came(wires)
    (answer,) = wires.couriers[0].incoming(Parcel(to_bytes(wires.asking(0, (0, 1, 2))), 0))
    shares = unpack_bytes(from_bytes(answer.message).shares)
    assert [shares[k : k + SHARE_BYTES] == NO_SHARE for k in range(0, 99, SHARE_BYTES)] == [False, True, False]
    assert wires.collector.masks_of(0, (0, 1, 2), SIZE) is not None, "two others hold the shares of client 1"


ROSTERS = {
    "another's key twice": lambda keys: [keys[0], keys[1], keys[1]],
    "another key for this client": lambda keys: [keys[1], keys[0], keys[2]],
    "a key of low order": lambda keys: [keys[0], bytes(64), keys[2]],
    "a short key": lambda keys: [keys[0], keys[1][:-1], keys[2]],
}


@pytest.mark.parametrize("case", ROSTERS)
def test_a_roster_that_is_none_ends_the_part_of_a_client(case: str):
    def change(roster: Roster) -> Roster:
        content = unpack_bytes(roster.keys)
        keys = ROSTERS[case]([content[k : k + 64] for k in range(0, 192, 64)])
        return replace(roster, keys=pack_bytes(b"".join(keys)), key_bytes=tuple(map(len, keys)))

    wires = MaskedWires(3, {0: (0, 1, 2)})
    changing(wires, "Roster", change)
    with pytest.raises(CodecError, match=r"gave client 0|is no public key"):
        wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))


def test_a_client_that_sends_no_keys_or_no_letters_is_left_out_and_the_others_sum():
    for missing in ("Advertise", "Shares"):
        wires = MaskedWires(4, {0: (0, 1, 2, 3)})
        wires._up = type(wires._up)((i, raw) for i, raw in wires._up if i != 3 or missing != "Advertise")
        if missing == "Shares":
            wires.silent = {3}
        wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
        assert wires.collector.members == (0, 1, 2)
        for client_id in range(3):
            wires.upload(client_id, update(client_id, torch.full((SIZE,), client_id, dtype=torch.int32)))
        total = sum(words_of(wires.collector.receive(1.0, "")[1]).numpy().view(np.uint32) for _ in range(3))
        total -= wires.collector.masks_of(0, (0, 1, 2), SIZE).numpy().view(np.uint32)
        assert (total == 0 + 1 + 2).all()


@pytest.mark.parametrize("phase", ["keys", "letters"])
@pytest.mark.parametrize("says_so", [True, False])
def test_nobody_waits_for_a_client_that_has_said_that_it_leaves(phase: str, says_so: bool):
    """The server asks for a message more only where it still waits for somebody."""
    wires, asked_in_vain = MaskedWires(4, {0: (0, 1, 2, 3)}), list[bool]()
    receive = wires.receive_until
    wires.receive_until = lambda *_: receive() or asked_in_vain.append(True)
    if phase == "keys":
        wires._up.pop()
    wires.silent = {3}
    if says_so:
        wires._up.append((3, to_bytes(Leave("LEDGER"))))
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
    assert wires.collector.members == (0, 1, 2)
    assert bool(asked_in_vain) is not says_so
    if says_so:
        assert from_bytes(wires.collector.receive(1.0, "")[1]) == Leave("LEDGER"), "and the run learns why"


def test_shares_that_come_when_others_were_enough_are_no_offence_and_once_more_they_are():
    wires = began(4, {0: (0, 1, 2, 3)})
    came(wires)
    wires.collector.masks_of(0, (0, 1, 2, 3), SIZE)
    (late,) = wires._up  # three of four are enough
    assert isinstance(from_bytes(late[1]), Revealed)
    wires.collector.receive_until(0.0)
    assert wires.refused == []
    wires._up.append(late)
    wires.collector.receive_until(0.0)
    assert [reason for _, reason, _ in wires.refused] == ["duplicate"]


@pytest.mark.parametrize("bad", [bytes(32), b"\1" + bytes(31), None], ids=["zero", "low order", "twice"])
@pytest.mark.parametrize("place", [0, 1], ids=["letters", "masks"])
def test_a_client_with_a_key_that_is_none_is_left_out_and_ends_nobodys_part(bad: bytes | None, place: int):
    wires = MaskedWires(4, {0: (0, 1, 2, 3)})

    def spoilt(client_id: int, raw: bytes) -> bytes:
        message = from_bytes(raw)
        if client_id != 3 or not isinstance(message, Advertise):
            return raw
        keys = [unpack_bytes(message.keys)[k : k + 32] for k in (0, 32)]
        keys[place] = keys[1 - place] if bad is None else bad
        return to_bytes(replace(message, keys=pack_bytes(b"".join(keys))))

    wires._up = type(wires._up)((i, spoilt(i, raw)) for i, raw in wires._up)
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
    assert wires.collector.members == (0, 1, 2)


def test_words_where_numbers_are_due_are_refused_and_numbers_where_words_are():
    grid, delta = FixedPointGrid(1.0, 3), deltas(3)[0]
    words = pack(grid.encode(delta), "word32")
    for form, fits, other in (
        (FixedPointWords(grid), words, pack(torch.cat([delta, delta[:1]]), "float32")),
        (Differences(Encoding("float32")), pack(delta, "float32"), pack(grid.encode(delta)[:-1], "word32")),
    ):
        fold = RoundFold(0, 0, {0: 1}, delta.numel(), form)
        problem = fold.take(0, Update(0, 0, 0, 7, -1, 0.5, 1, 0.1, 0, 1, other))
        assert problem is not None and problem.reason == "misfit" and other.format in problem.text
        assert fold.take(0, Update(0, 0, 0, 7, -1, 0.5, 1, 0.1, 0, 1, fits)) is None


def colluding(num_clients: int, num_colluders: int) -> bool:
    """Tell honest clients different sets; return whether the server can take the mask off client 0's update."""
    everybody = tuple(range(num_clients))
    wires, threshold = began(num_clients, {0: everybody}), threshold_of(num_clients)
    masked = next(words_of(raw) for who, raw in iter(lambda: wires.collector.receive(1.0, ""), None) if who == 0)
    colluders = everybody[num_clients - num_colluders :]
    honest = everybody[: num_clients - num_colluders]
    seeds, keys = ({i: wires.couriers[i]._kept[0, 0][kind] for i in colluders} for kind in (0, 1))
    for i in honest:
        is_for_seed = len(seeds) < threshold
        asked = everybody if is_for_seed else everybody[1:]
        (answer,) = wires.couriers[i].incoming(Parcel(to_bytes(wires.asking(0, asked)), 0))
        share = unpack_bytes(from_bytes(answer.message).shares)[:SHARE_BYTES]
        (seeds if is_for_seed else keys)[i] = share
    if min(len(seeds), len(keys)) < threshold:
        return False
    seed, key = join_secret(seeds), join_secret(keys)
    masks = [own_mask(seed)]
    masks += [pair_mask(key, wires.couriers[0]._public[other][1], 0, 0, other) for other in everybody[1:]]
    of_zeros = add_masks(np.zeros(SIZE, np.uint32), masks)  # as the update is
    return bool((masked.numpy().view(np.uint32) == of_zeros).all())


@pytest.mark.parametrize(("clients", "stay", "colluders"), [(3, 2, 1), (8, 6, 4), (30, 20, 10)])
def test_a_server_that_deviates_needs_as_many_sites_as_the_page_says(clients: int, stay: int, colluders: int):
    assert threshold_of(clients) == stay
    assert colluding(clients, colluders)
    assert not colluding(clients, colluders - 1)
    page = (Path(__file__).parents[3] / "docs" / "privacy.md").read_text()
    assert re.search(rf"\| {clients} \| {stay} \| {stay} sites \| {colluders} sites? \|", page)


# -- what the server can see ------------------------------------------------------------------------------------


def chi_square(words: torch.Tensor) -> float:
    """Of the highest and of the lowest 8 bits against an even spread; 510 degrees of freedom together."""
    found = words.numpy().view(np.uint32)
    expected = len(found) / 256
    return sum(
        float(((np.bincount(part, minlength=256) - expected) ** 2 / expected).sum())
        for part in (found >> np.uint32(24), found & np.uint32(255))
    )


def test_a_masked_update_cannot_be_told_from_noise_and_one_on_the_plain_grid_can():
    size, grid = 1 << 17, FixedPointGrid(1.0, 3)
    wires = MaskedWires(3, {0: (0, 1, 2)})
    plain = grid.encode(deltas(3, size)[0])
    wires.upload(0, update(0, plain))
    _, raw = wires.collector.receive(1.0, "the update")
    # 510 ± 32: five deviations above are 670
    assert chi_square(words_of(raw)) < 670
    assert chi_square(plain) > 10_000
