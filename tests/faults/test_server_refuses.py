"""The server against clients that answer from a script: what counts, what is refused and why, and never twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import server_plan
from parablock.algorithm.parablock import NEVER, initial_server, same
from parablock.clock import RealClock
from parablock.engine.local_steps import FixedSteps
from parablock.engine.plans import Hooks, ServerPlan, ServerStart
from parablock.engine.server import Server
from parablock.engine.update_form import Differences
from parablock.engine.update_store import UpdateStore
from parablock.errors import CodecError, StallError
from parablock.trace import Trace
from parablock.wire.messages import Finish, Join, Mark, RoundStart, Skip, Update, Welcome, from_bytes, to_bytes
from parablock.wire.quantize import CHUNK_PIECE, Encoding, pack
from parablock.wire.transport import Ledger, Parcel
from sealed_messages import sealed

SIZE = 3 * CHUNK_PIECE
CHUNKED = Encoding("float32", chunk_bytes=4 * CHUNK_PIECE)
CLIENTS, ROUNDS = 4, 6
Answer = Callable[[int, RoundStart, list[bytes]], list[tuple[int, bytes]]]
"""(client_id, what it was asked, its honest update) → what arrives, from whom."""


class Script:
    """A transport whose clients answer at once; `answer` says what."""

    sizes = (SIZE, SIZE)

    def __init__(self, answer: Answer) -> None:
        self.ledger = Ledger()
        self._answer, self._arrives, self.sent = answer, deque[tuple[int, bytes]](), list[tuple[int, object]]()

    def send(self, client_id: int, parcel: Parcel) -> None:
        message = from_bytes(parcel.message)
        self.sent.append((client_id, message))
        if isinstance(message, RoundStart):
            self._arrives.extend(
                self._answer(client_id, message, honest(client_id, message, self.sizes[message.block_index]))
            )

    def is_there(self, client_id: int) -> bool:
        return True

    def receive(self, timeout_s: float, waiting_for: str, from_clients=None) -> tuple[int, bytes]:
        if not self._arrives:
            raise StallError(f"nothing moved for {timeout_s} s while waiting for {waiting_for}")
        return self._arrives.popleft()

    def receive_until(self, deadline_s: float, from_clients=None) -> tuple[int, bytes] | None:
        raise AssertionError(f"no deadline is set: {deadline_s}, {from_clients}")


def honest(client_id: int, start: RoundStart, size: int = SIZE) -> list[bytes]:
    generator = torch.Generator().manual_seed(100 * start.round_index + client_id)
    delta = torch.randn(size, generator=generator)
    cuts = CHUNKED.cut(size)
    whole = Update(
        start.round_index,
        start.block_index,
        client_id,
        client_id + 1,
        start.committed,
        1.0,
        start.num_local_steps,
        0.5,
        0,
        len(cuts),
        pack(delta, "float32"),
    )
    return [
        to_bytes(replace(whole, chunk_index=k, delta=pack(delta[cut], "float32"))) for k, cut in enumerate(cuts)
    ]


def plan_of(delay: int, *, rounds: int = ROUNDS, **options) -> ServerPlan:
    options = {"schedule": "cyclic", "local_steps": FixedSteps(2), "stall_timeout_s": 5.0, **options}
    return server_plan(CLIENTS, rounds, delay, Differences(CHUNKED), **options)


def serve(
    answer: Answer,
    *,
    delay: int = 0,
    rounds: int = ROUNDS,
    resumed: Server | None = None,
    script: type[Script] = Script,
    **options,
) -> tuple[Server, list[list[int]], Script, list[str]]:
    plan = plan_of(delay, rounds=rounds, **options)
    transport, counted, events = script(answer), [], []
    start = ServerStart(initial_server([torch.zeros(script.sizes[0]), torch.ones(script.sizes[1])]))
    if resumed:
        start = ServerStart(resumed.state, resumed.state.committed + 1, resumed.held)
    hooks = Hooks(
        lambda _, updates, traffic: counted.append([update.client_id for update in updates]),
        lambda _: None,
        on_event=events.append,
    )
    server = Server(start, plan, transport, Trace(RealClock()), hooks=hooks, on_mark=lambda *_: None)
    assert server.run()
    return server, counted, transport, events


def everybody_honest(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
    del start
    return [(client_id, chunk) for chunk in update]


def with_noise(noise: Callable[[int, RoundStart, list[bytes]], list[tuple[int, bytes]]], *, first: bool) -> Answer:
    def answer(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        rest = everybody_honest(client_id, start, update)
        return noise(client_id, start, update) + rest if first else rest + noise(client_id, start, update)

    return answer


def changed(raw: bytes, **fields) -> bytes:
    message = from_bytes(raw)
    assert isinstance(message, Update)
    return to_bytes(replace(message, **fields))


NOISE = {
    "each chunk twice": (lambda i, _, update: [(i, chunk) for chunk in update], "duplicate"),
    "the first chunk with other values": (
        lambda i, _, update: [(i, changed(update[0], delta=pack(torch.ones(CHUNK_PIECE), "float32")))],
        "duplicate",
    ),
    "an update for a round to come": (
        lambda i, start, update: [(i, changed(update[-1], round_index=start.round_index + 2))],
        "unasked",
    ),
    "an update in another's name": (lambda i, _, update: [((i + 1) % CLIENTS, update[-1])], None),
    "a server's message": (lambda i, _, update: [(i, to_bytes(Mark(3, stop=True)))], "misfit"),
    "noise": (lambda i, _, update: [(i, b"PBLK" + bytes(40))], "corrupt"),
    "half a chunk": (lambda i, _, update: [(i, update[0][: len(update[0]) // 2])], "corrupt"),
    "a skip of a round long past": (lambda i, start, update: [(i, to_bytes(Skip(start.round_index - 3)))], None),
}


AFTER = [(case, False) for case in NOISE]
BEFORE = [(case, True) for case in NOISE if "chunk" not in case or case == "half a chunk"]


@pytest.mark.parametrize(("case", "first"), AFTER + BEFORE)
def test_what_is_no_update_of_the_round_changes_nothing(case: str, first: bool):
    noise, reason = NOISE[case]
    clean, noisy = serve(everybody_honest), serve(with_noise(noise, first=first))
    assert same(clean[0].state.params, noisy[0].state.params)
    assert clean[1] == noisy[1] == [[0, 1, 2, 3]] * ROUNDS
    assert not clean[0].refused
    assert (reason is None) or noisy[0].refused[reason] >= ROUNDS


def test_what_a_site_sends_again_after_a_resume_is_no_offence():
    first, whole = serve(everybody_honest, rounds=3)[0], serve(everybody_honest)[0]

    def again(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        old = honest(client_id, replace(start, round_index=2, block_index=0, committed=1))
        return everybody_honest(client_id, start, old + update)

    server, counted, _, events = serve(again, resumed=first)
    assert same(server.state.params, whole.state.params)
    assert counted == [[0, 1, 2, 3]] * 3
    assert not server.refused and not events
    assert serve(again)[0].refused["duplicate"], "without a resume it is one"


ON_AND_ON = {
    "the first chunk again": lambda start, update: update[0],
    "noise": lambda start, update: b"PBLK" + bytes(40),
    "a server's message": lambda start, update: to_bytes(Mark(3, stop=True)),
    "a chunk of a round long past": lambda start, update: changed(update[0], round_index=start.round_index - 3),
    "a chunk of a round to come": lambda start, update: changed(update[0], round_index=start.round_index + 3),
    "a skip of a round long past": lambda start, update: to_bytes(Skip(start.round_index - 3)),
}


@pytest.mark.parametrize("case", ON_AND_ON)
def test_a_round_does_not_wait_for_a_client_that_sends_nothing_of_use_on_and_on(case: str):
    class Endless(Script):
        """Client 2 sends a chunk of its update of round 3, and nothing new after it."""

        sent_on_and_on, useless = 0, b""

        def receive(self, timeout_s: float, waiting_for: str, from_clients=None) -> tuple[int, bytes]:
            if not self._arrives:
                Endless.sent_on_and_on += 1
                assert Endless.sent_on_and_on < 1000, f"the server still waits for {waiting_for}"
                return 2, Endless.useless
            return super().receive(timeout_s, waiting_for, from_clients)

    def answer(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        if (client_id, start.round_index) == (2, 5):  # it has delivered again since: one such message is no matter
            return [(2, Endless.useless), *everybody_honest(client_id, start, update)]
        if (client_id, start.round_index) != (2, 3):
            return everybody_honest(client_id, start, update)
        Endless.sent_on_and_on, Endless.useless = 0, ON_AND_ON[case](start, update)
        return [(2, update[0])]

    server, counted, _, events = serve(answer, script=Endless)
    assert counted == [[0, 1, 2, 3]] * 3 + [[0, 1, 3]] + [[0, 1, 2, 3]] * 2
    assert server.refused["useless"] == 1
    assert "refused (useless): client 2 sent no update, again and again" in events
    assert Endless.sent_on_and_on > 2 * 3, "the chunks of two late updates are no nuisance yet"


def test_the_chunks_of_a_late_update_of_a_large_block_are_no_nuisance_to_the_round_of_a_small_one():
    class Late(Script):
        """Client 2 skips round 2, and sends its update of it, forty chunks, in round 3 before that of round 3."""

        sizes = (40 * CHUNK_PIECE, CHUNK_PIECE)

    kept: list[bytes] = []

    def answer(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        if (client_id, start.round_index) == (2, 2):
            kept.extend(update)
            return [(2, to_bytes(Skip(2)))]
        before = kept if (client_id, start.round_index) == (2, 3) else []
        return [(client_id, chunk) for chunk in [*before, *update]]

    server, counted, _, _ = serve(answer, script=Late)
    assert counted == [[0, 1, 2, 3]] * 2 + [[0, 1, 3]] + [[0, 1, 2, 3]] * 3
    assert "useless" not in server.refused and len(kept) == 40


BAD = {
    "NaN in the last chunk": ({"delta": pack(torch.full((CHUNK_PIECE,), torch.nan), "float32")}, "not_finite"),
    "infinity": ({"delta": pack(torch.full((CHUNK_PIECE,), torch.inf), "float32")}, "not_finite"),
    "a loss that is none": ({"train_loss": 123456.0}, "not_finite"),
    "another block": ({"block_index": 7}, "misfit"),
    "too few parameters": ({"delta": pack(torch.zeros(5), "float32")}, "misfit"),
    "more chunks": ({"num_chunks": 9}, "misfit"),
    "a chunk that there is not": ({"chunk_index": 17}, "misfit"),
    "another number of steps": ({"num_local_steps": 0}, "misfit"),
    "no examples": ({"num_examples": 0}, "num_examples"),
    "other examples than before": ({"num_examples": 5}, "num_examples"),
    "absurdly long": ({"delta": pack(torch.full((CHUNK_PIECE,), 1e6), "float32")}, "norm"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("delay", [0, 1])
def test_a_bad_last_chunk_takes_the_whole_update_out_although_the_others_were_folded(case: str, delay: int):
    fields, reason = BAD[case]

    def bad(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        if (client_id, start.round_index) == (2, 3):
            last = changed(update[-1], **fields)
            if case == "a loss that is none":  # our own encoder would not write it
                last = sealed(last[:-4].replace(b"123456.0", b"NaN     "))
            update = [*update[:-1], last]
        return everybody_honest(client_id, start, update)

    def silent(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        left_out = (client_id, start.round_index) == (2, 3)
        return [(client_id, to_bytes(Skip(3)))] if left_out else everybody_honest(client_id, start, update)

    server, counted, _, events = serve(bad, delay=delay)
    assert server.refused == {reason: 1}
    assert counted[3] == [0, 1, 3]
    assert [counted[t] for t in (0, 1, 2, 4, 5)] == [[0, 1, 2, 3]] * 5
    assert f"refused ({reason}): client 2 sent" in "\n".join(events)
    assert same(server.state.params, serve(silent, delay=delay)[0].state.params), "as if it had sent nothing"
    assert not same(server.state.params, serve(everybody_honest, delay=delay)[0].state.params)


@pytest.mark.parametrize("delay", [0, 1])
def test_what_was_folded_from_a_file_is_folded_anew_from_it_and_no_file_is_left_open(
    delay: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def bad(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        if client_id == start.round_index % CLIENTS:
            update = [*update[:-1], changed(update[-1], train_loss=0.0, num_examples=9)]
        return everybody_honest(client_id, start, update)

    def open_files() -> list[str]:
        links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [name for name in links if name.startswith(str(tmp_path))]

    def mute(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        return [] if start.round_index == 4 and client_id else bad(client_id, start, update)

    closed, close = list[bool](), UpdateStore.close
    monkeypatch.setattr(UpdateStore, "close", lambda self: (closed.append(self._file is not None), close(self)))
    in_memory = serve(bad, delay=delay)
    assert not any(closed)
    monkeypatch.setattr("parablock.engine.round_fold.IN_MEMORY_BYTES", 0)
    in_file = serve(bad, delay=delay, folder=tmp_path)
    assert same(in_memory[0].state.params, in_file[0].state.params)
    assert in_memory[1] == in_file[1]
    assert all(t % CLIENTS not in counted for t, counted in enumerate(in_file[1]))
    assert not same(in_file[0].state.params, serve(everybody_honest, delay=delay)[0].state.params)
    assert any(closed) and open_files() == []
    closed.clear()
    with pytest.raises(StallError):
        serve(mute, delay=delay, folder=tmp_path, min_updates=3)
    assert closed[-1] and open_files() == []


def test_absurd_examples_are_seen_beside_the_others_and_by_themselves():
    for count in (10**6, 10**13):

        def greedy(client_id: int, start: RoundStart, update: list[bytes], count=count) -> list[tuple[int, bytes]]:
            if client_id == 1:
                update = [changed(chunk, num_examples=count) for chunk in update]
            return everybody_honest(client_id, start, update)

        server, counted, _, _ = serve(greedy)
        assert server.refused == {"num_examples": ROUNDS}
        assert counted == [[0, 2, 3]] * ROUNDS


def scaled(update: list[bytes], factor: float, **fields) -> list[bytes]:
    deltas = [from_bytes(chunk).delta.values * factor for chunk in update]
    return [
        changed(chunk, delta=pack(delta, "float32"), **fields) for chunk, delta in zip(update, deltas, strict=True)
    ]


def with_one(change: Callable[[list[bytes]], list[bytes]], *, alone_with: int | None = None) -> Answer:
    """Client 1 sends what `change` makes of its update, beside all others, or one."""

    def answer(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        if alone_with is not None and client_id not in (1, alone_with):
            return [(client_id, to_bytes(Skip(start.round_index)))]
        return everybody_honest(client_id, start, change(update) if client_id == 1 else update)

    return answer


def test_of_two_clients_one_cannot_carry_the_model_away(monkeypatch: pytest.MonkeyPatch):
    huge = with_one(lambda update: scaled(update, 1e12), alone_with=0)
    server, counted, _, _ = serve(huge)
    assert server.refused == {"norm": ROUNDS}
    assert counted == [[0]] * ROUNDS
    tiny = serve(with_one(lambda update: scaled(update, 1e-6), alone_with=0))
    assert tiny[1][1::2] == [[0, 1]] * (ROUNDS // 2), "beside a tiny update another is no outlier of a real block"
    monkeypatch.setattr("parablock.engine.round_fold.MAX_NORM_RATIO", 1e13)
    assert serve(huge)[1] == [[0, 1]] * ROUNDS, "it was the ratio"


def test_what_counts_is_examples_times_length():
    for factor, examples, counts in ((90.0, 2, True), (1.0, 5000, True), (90.0, 5000, False)):
        change = lambda update, f=factor, n=examples: scaled(update, f, num_examples=n)  # noqa: E731
        server, counted, _, _ = serve(with_one(change))
        assert counted == [[0, 1, 2, 3] if counts else [0, 2, 3]] * ROUNDS
        assert server.refused == ({} if counts else {"norm": ROUNDS})


def test_a_cap_of_examples_is_the_largest_weight():
    capped = serve(with_one(lambda update: scaled(update, 1.0, num_examples=5000)), max_client_examples=2)
    claims = {0: 1, 1: 2, 2: 2, 3: 2}

    def modest(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        return everybody_honest(client_id, start, scaled(update, 1.0, num_examples=claims[client_id]))

    assert same(capped[0].state.params, serve(modest)[0].state.params)
    assert not same(capped[0].state.params, serve(everybody_honest)[0].state.params)


def test_clients_of_another_model_end_the_run_and_one_alone_does_not():
    def other(
        client_id: int, start: RoundStart, update: list[bytes], whose=(0, 1, 2, 3)
    ) -> list[tuple[int, bytes]]:
        if client_id in whose:
            update = [changed(chunk, delta=pack(torch.zeros(7), "float32")) for chunk in update]
        return everybody_honest(client_id, start, update)

    with pytest.raises(CodecError, match=r"every update of round 1 was refused: .* 7 parameters where block 0 has"):
        serve(other)
    server, counted, _, _ = serve(lambda i, start, update: other(i, start, update, whose=(3,)))
    assert counted == [[0, 1, 2]] * ROUNDS
    assert server.refused["misfit"] == ROUNDS


def test_a_round_that_cannot_have_enough_updates_any_more_is_void():
    def shy(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        skips = start.round_index == 3 and client_id > 0
        return [(client_id, to_bytes(Skip(3)))] if skips else everybody_honest(client_id, start, update)

    alone, void = serve(shy), serve(shy, min_updates=2)
    assert alone[1][3] == [0]
    assert void[1][3] == []
    assert void[0].state.versions[1] == 5
    assert void[0].state.committed == ROUNDS - 1
    assert "cannot get 2 updates any more" in "\n".join(void[3])
    assert not same(alone[0].state.params, void[0].state.params)


@pytest.mark.parametrize("void", [True, False])
def test_a_void_round_overwrites_no_value_that_a_checkpoint_would_hold_twice(void: bool):
    def shy(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        skips = void and start.round_index == ROUNDS - 1 and client_id > 0
        return [(client_id, to_bytes(Skip(ROUNDS - 1)))] if skips else everybody_honest(client_id, start, update)

    server, counted, _, _ = serve(shy, delay=1, min_updates=2)
    assert bool(counted[-1]) != void
    assert [t for t, _ in server.overwritten] == ([] if void else [ROUNDS])


def test_a_client_that_begins_anew_is_welcomed_with_every_block_that_it_lacks():
    def restarts(client_id: int, start: RoundStart, update: list[bytes]) -> list[tuple[int, bytes]]:
        if (client_id, start.round_index) == (1, 4) and start.news and not restarted:
            restarted.append(True)
            return [(1, to_bytes(Join((NEVER, NEVER), ())))]
        return everybody_honest(client_id, start, update)

    restarted: list[bool] = []
    server, counted, transport, _ = serve(restarts)
    assert same(server.state.params, serve(everybody_honest)[0].state.params)
    assert counted == [[0, 1, 2, 3]] * ROUNDS
    sent = [message for client_id, message in transport.sent if client_id == 1]
    welcome = next(k for k, message in enumerate(sent) if isinstance(message, Welcome))
    again = sent[welcome + 1]
    assert isinstance(again, RoundStart)
    assert again.round_index == 4
    assert [(new.block_index, new.version, new.kind) for new in again.news] == [(0, 2, "value"), (1, 3, "value")]
    assert isinstance(sent[-1], Finish)
    with pytest.raises(StallError):  # a model of three blocks is not welcome, and nobody else answers for it
        serve(
            lambda i, s, u: [(1, to_bytes(Join((NEVER,) * 3, ())))] if i == 1 else everybody_honest(i, s, u),
            min_updates=4,
        )
