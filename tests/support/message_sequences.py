"""Sequences of messages, valid ones and others, in any order, from anybody: what the ends of a run make of them.

Each function plays one sequence against one end, and counts: leaks, foreign exceptions, and ended runs. A leak is
anything that lets the server see more of a client than one update, or one sum of enough updates, in a round.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from engines import server_plan
from parablock.algorithm.parablock import initial_client, initial_server
from parablock.clock import RealClock
from parablock.engine.client import Client
from parablock.engine.plans import ClientPlan, ClientStart, Hooks, ServerStart
from parablock.engine.server import Server
from parablock.engine.update_form import Differences
from parablock.errors import CodecError, MaskingError, StallError
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.masked_server import MaskedServer
from parablock.privacy.masking import Cohorts
from parablock.privacy.protection import threshold_of
from parablock.storage.release_ledger import ReleaseLedger
from parablock.trace import Trace
from parablock.wire import messages, sealing
from parablock.wire.messages import Update, from_bytes, to_bytes
from parablock.wire.quantize import Encoding, pack
from parablock.wire.sealing import pack_bytes, unpack_bytes
from parablock.wire.transport import Ledger, Parcel
from toy import ToyTrainer

Draw = np.random.Generator
CLIENTS, ROUNDS, SIZE, BLOCKS = 4, 3, 6, 2
COHORTS = Cohorts(CLIENTS, {t: tuple(range(CLIENTS)) for t in range(ROUNDS)})
VICTIM, HOSTILE = 0, 3
MOST = 14
"""Messages of a sequence at most."""


def one_of(choices: Sequence[Any], draw: Draw) -> Any:
    return choices[int(draw.integers(len(choices)))]


def masked_update(client_id: int, round_index: int, value: int = 0) -> bytes:
    words = torch.full((SIZE,), 1000 * client_id + value, dtype=torch.int32)
    return to_bytes(Update(round_index, 0, client_id, 1, -1, 0.0, 1, 0.1, 0, 1, pack(words, "word32")))


class Watch:
    """What a client lets out of its hands, however often it begins anew; it knows what that must never be."""

    def __init__(self) -> None:
        self.updates: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        self.sets: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        self.apart: set[int] = set()
        self.shares: dict[int, set[bytes]] = defaultdict(set)

    def saw(self, life: int, asked: bytes, answers: Sequence[Parcel]) -> None:
        """Note the answers to a message in one of the client's lives."""
        for answer in answers:
            match message := from_bytes(answer.message):
                case Update():
                    self.updates[life, message.round_index].add(unpack_bytes(message.delta))
                case sealing.Shares():
                    self.shares[life].add(answer.message)
                case sealing.Revealed() if message.shares.num_elements:
                    question = from_bytes(asked)
                    assert isinstance(question, sealing.Reveal)
                    self.sets[message.round_index].add(question.clients)
                    if any(set(left_out) & set(question.clients) for left_out in question.left_out):
                        self.apart.add(message.round_index)

    @property
    def leaks(self) -> list[str]:
        """Describe everything that must not be."""
        few = threshold_of(CLIENTS)
        return [
            *(
                f"{len(each)} updates under the mask of {place}"
                for place, each in self.updates.items()
                if len(each) > 1
            ),
            *(f"{len(each)} shares of one life" for each in self.shares.values() if len(each) > 1),
            *(f"a sum of clients in round {t} that do not all mask with each other" for t in self.apart),
            *(f"sums of round {t} over {each}" for t, each in self.sets.items() if len(each) > 1),
            *(f"a sum over {s} in round {t}" for t, each in self.sets.items() for s in each if len(set(s)) < few),
        ]


# -- a client of secure aggregation ------------------------------------------------------------------------------


@cache
def exchange() -> tuple[list[MaskedClient], list[bytes], list[bytes]]:
    """Return clients that have sent their keys, and what an honest server sends the victim then."""
    clients = [MaskedClient(i, COHORTS, ReleaseLedger()) for i in range(CLIENTS)]
    adverts = [client.opening()[0].message for client in clients]
    keys = [unpack_bytes(from_bytes(raw).keys) for raw in adverts]
    lengths = tuple(map(len, keys))
    roster = sealing.Roster(
        tuple(range(CLIENTS)), lengths, (0,) * CLIENTS, pack_bytes(b"".join(keys)), pack_bytes(b"")
    )
    opened = [copy.deepcopy(client) for client in clients]
    shares = [from_bytes(c.incoming(Parcel(to_bytes(roster), 0))[0].message) for c in copy.deepcopy(clients)]
    letters = [sealing.cut(s.letters, s.letter_bytes) for s in shares]
    mine = [letters[sender][VICTIM - (sender < VICTIM)] for sender in range(CLIENTS) if sender != VICTIM]
    hashes = [of_victim(unpack_bytes(shares[sender].commitments)) for sender in range(CLIENTS) if sender != VICTIM]
    others = tuple(i for i in range(CLIENTS) if i != VICTIM)
    to_victim = sealing.Letters(
        others, tuple(map(len, mine)), pack_bytes(b"".join(mine)), pack_bytes(b"".join(hashes))
    )
    return opened, adverts, [to_bytes(roster), to_bytes(to_victim)]


def of_victim(commitments: bytes) -> bytes:
    size = 16 * (1 + 2 * CLIENTS)
    places = [t * size + 16 * (1 + 2 * VICTIM) for t in range(ROUNDS)]
    return b"".join(commitments[place : place + 32] for place in places)


def from_a_hostile_server(draw: Draw) -> bytes:
    """Return a message that a server may send a client of secure aggregation."""
    _, adverts, (roster, letters) = exchange()
    clients = tuple(int(i) for i in draw.integers(0, CLIENTS + 1, int(draw.integers(0, CLIENTS + 2))))
    asked = clients if draw.random() < 0.3 else tuple(sorted(set(clients)))
    reveal = to_bytes(asking(int(draw.integers(0, ROUNDS + 1)), asked, draw))
    whole = to_bytes(asking(int(draw.integers(0, ROUNDS)), tuple(range(CLIENTS - int(draw.integers(2))))))
    leave_out = to_bytes(sealing.LeaveOut(int(draw.integers(0, CLIENTS + 1))))
    kinds = [
        roster,
        letters,
        roster,
        letters,
        reveal,
        reveal,
        whole,
        leave_out,
        altered(roster, draw),
        altered(letters, draw),
    ]
    return bytes(one_of([*kinds, adverts[1], b"PBLK", damaged(roster, draw)], draw))


def asking(t: int, clients: tuple[int, ...], draw: Draw | None = None) -> sealing.Reveal:
    """Ask for a sum of clients that mask with all, or that leave somebody out."""
    left_out = [() if draw is None or draw.random() < 0.8 else (int(draw.integers(CLIENTS)),) for _ in clients]
    return sealing.Reveal(t, clients, tuple(left_out), (0,) * len(clients), pack_bytes(b""))


def altered(raw: bytes, draw: Draw) -> bytes:
    """Change a field of a message of bytes under a right checksum."""
    message = from_bytes(raw)
    fields = {name: value for name, value in vars(message).items() if name != "clients"}
    name = one_of(sorted(fields), draw)
    value = fields[name]
    if isinstance(value, tuple):
        changed = value[: int(draw.integers(len(value) + 1))]
    elif isinstance(value, int):
        changed = int(draw.integers(0, 9))
    else:
        content = bytearray(unpack_bytes(value)) or bytearray(1)
        content[int(draw.integers(len(content)))] ^= 1 << int(draw.integers(8))
        changed = pack_bytes(bytes(content[: int(draw.integers(1, len(content) + 1))]))
    return to_bytes(replace(message, **{name: changed}))


def damaged(raw: bytes, draw: Draw) -> bytes:
    content = bytearray(raw)
    content[int(draw.integers(len(content)))] ^= 1 << int(draw.integers(8))
    return bytes(content)


def play_masked_client(draw: Draw) -> Counter[str]:
    """Let a server send a client what it likes, while the client's compute thread hands over updates."""
    client, watch, found = copy.deepcopy(exchange()[0][VICTIM]), Watch(), Counter[str]()
    for _ in range(int(draw.integers(3, MOST))):
        try:
            if draw.random() < 0.3:
                asked = masked_update(VICTIM, int(draw.integers(0, ROUNDS + 1)), int(draw.integers(2)))
                watch.saw(0, asked, client.outgoing(Parcel(asked, 0)))
            else:
                asked = from_a_hostile_server(draw)
                watch.saw(0, asked, client.incoming(Parcel(asked, 0)) or [])
        except CodecError:
            break  # the client leaves this server
        except Exception as error:
            found[f"foreign: {error!r:.60}"] += 1
            break
    found.update(f"leak: {leak}" for leak in watch.leaks)
    return found


# -- the server of secure aggregation ----------------------------------------------------------------------------


class Crossing:
    """Honest clients at a server, with one whose messages come in between."""

    def __init__(self, clients: Sequence[MaskedClient], hostile: Callable[[], Sequence[bytes]]) -> None:
        self.clients, self.hostile, self.ledger = clients, hostile, Ledger()
        self.up = deque[tuple[int, bytes]]()
        self.patience = 60
        for client_id, client in enumerate(clients):
            self.take(client_id, client.opening())

    def take(self, client_id: int, parcels: Sequence[Parcel]) -> None:
        self.up.extend((client_id, parcel.message) for parcel in parcels)

    def is_there(self, client_id: int) -> bool:
        return True

    def send(self, client_id: int, parcel: Parcel) -> None:
        if client_id != HOSTILE:
            self.take(client_id, self.clients[client_id].incoming(parcel) or [])

    def receive_until(self, *_: object) -> tuple[int, bytes] | None:
        self.patience -= 1
        if self.patience > 0:
            self.up.extendleft((HOSTILE, raw) for raw in self.hostile())
        return self.up.popleft() if self.up else None

    def receive(self, timeout_s: float, waiting_for: str, *_: object) -> tuple[int, bytes]:
        if (received := self.receive_until()) is None:
            raise StallError(waiting_for)
        return received


def from_a_hostile_member(draw: Draw, honest: Sequence[bytes]) -> bytes:
    """Return a message that a client may send the server of secure aggregation."""
    _, adverts, (roster, letters) = exchange()
    revealed = sealing.Revealed(int(draw.integers(0, ROUNDS)), one_of(range(CLIENTS), draw), pack_bytes(bytes(132)))
    own = one_of(honest, draw) if honest else adverts[HOSTILE]
    lied = tuple(i for i in range(CLIENTS) if draw.random() < 0.2)
    return bytes(
        one_of(
            [
                *adverts,
                own,
                altered(own, draw),
                altered(adverts[HOSTILE], draw),
                damaged(own, draw),
                to_bytes(revealed),
                to_bytes(sealing.Partners(int(draw.integers(0, ROUNDS + 1)), HOSTILE, lied, pack_bytes(b"a"))),
                to_bytes(sealing.LeaveOut(int(draw.integers(CLIENTS)))),
                roster,
                letters,
                b"",
                masked_update(HOSTILE, int(draw.integers(0, 5))),
            ],
            draw,
        )
    )


def play_masked_server(draw: Draw) -> Counter[str]:
    """Let one of four clients send what it likes: the sum of the others is exact, or the client is named.

    Else the round is void: where one client says that it has no share of another, either may lie.
    """
    found = Counter[str]()
    everybody = copy.deepcopy(exchange()[0])
    for client in everybody:
        client._opened = False  # they send the same keys once more
    honest: list[bytes] = []

    def hostile() -> list[bytes]:
        return [from_a_hostile_member(draw, honest) for _ in range(int(draw.integers(0, 3)))]

    crossing = Crossing(everybody, hostile)
    if draw.random() < 0.5:  # it says nothing of its own accord
        crossing.up = deque(item for item in crossing.up if item[0] != HOSTILE)
    else:  # or it has true letters, which may be altered
        roster = exchange()[2][0]
        honest += [parcel.message for parcel in everybody[HOSTILE].incoming(Parcel(roster, 0)) or []]
    server = MaskedServer(
        crossing, COHORTS, ReleaseLedger(), RealClock(), stall_timeout_s=5.0, most_kept_bytes=1 << 20
    )
    try:
        server.send(HOSTILE, Parcel(b"", 0))
        for client_id in range(HOSTILE):
            crossing.take(client_id, everybody[client_id].outgoing(Parcel(masked_update(client_id, 0), 0)))
        came: dict[int, np.ndarray] = {}
        while len(came) < HOSTILE:
            client_id, raw = server.receive(1.0, "updates")
            if client_id != HOSTILE:
                update = from_bytes(raw)
                assert isinstance(update, Update)
                came[client_id] = update.delta.values.numpy().view(np.uint32)
        masks = server.masks_of(0, sorted(came), SIZE).numpy().view(np.uint32)
        total = np.sum(list(came.values()), axis=0, dtype=np.uint32) - masks
        if not (total == 1000 * sum(range(HOSTILE))).all():
            found["ended: a wrong sum"] += 1
    except MaskingError as error:
        if error.client_id is None and "to blame client" in (error.cause or ""):
            found["void: nobody is named"] += 1
        elif error.client_id != HOSTILE:
            found[f"ended: {error.what:.60}"] += 1
    except Exception as error:
        found[f"foreign: {error!r:.60}"] += 1
    return found


# -- the server of rounds ----------------------------------------------------------------------------------------


def honest_update(client_id: int, start: messages.RoundStart) -> Update:
    draws = torch.Generator().manual_seed(100 * start.round_index + client_id)
    delta = pack(torch.randn(SIZE, generator=draws), "float32")
    t, b, committed, steps = start.round_index, start.block_index, start.committed, start.num_local_steps
    return Update(t, b, client_id, client_id + 1, committed, 1.0, steps, 0.5, 0, 1, delta)


def from_a_hostile_client(start: messages.RoundStart, draw: Draw) -> bytes:
    """Return a message that a client may send the server of rounds."""
    update = honest_update(HOSTILE, start)
    number = int(draw.integers(-2, ROUNDS + 2))
    values = [0.0, 1.0, 1e30, float("nan"), float("inf"), -1e-30]
    lies = {
        "round_index": number,
        "block_index": number,
        "client_id": number,
        "num_examples": one_of([-1, 0, 1, 7, 1 << 39, 1 << 61], draw),
        "committed": number,
        "train_loss": one_of([-1.0, 0.0, 1e30], draw),
        "num_local_steps": number,
        "chunk_index": number,
        "num_chunks": number,
        "delta": pack(torch.full((int(draw.integers(1, 9)),), one_of(values, draw)), "float32"),
    }
    name = one_of(sorted(lies), draw)
    raw = to_bytes(replace(update, **{name: lies[name]}))
    versions = tuple(int(v) for v in draw.integers(-2, 4, int(draw.integers(1, 4))))
    others = [messages.Skip(number, one_of(["", "no"], draw)), messages.Leave("bye"), messages.Welcome()]
    others += [messages.Join(versions, tuple(range(int(draw.integers(0, 4))))), messages.Mark(2, stop=True)]
    others += [asking(0, (0, 1)), messages.Finish(3, ()), start]
    return bytes(
        one_of([to_bytes(update), raw, raw, damaged(raw, draw), b"", to_bytes(one_of(others, draw))], draw)
    )


class Answers:
    """A transport whose clients answer at once, one of them with what it likes."""

    def __init__(self, draw: Draw) -> None:
        self.ledger, self._draw = Ledger(), draw
        self._arrives = deque[tuple[int, bytes]]()

    def send(self, client_id: int, parcel: Parcel) -> None:
        message = from_bytes(parcel.message)
        if not isinstance(message, messages.RoundStart):
            return
        if client_id != HOSTILE:
            self._arrives.append((client_id, to_bytes(honest_update(client_id, message))))
        for _ in range(int(self._draw.integers(0, 3))):
            raw = from_a_hostile_client(message, self._draw)
            place = int(self._draw.integers(0, len(self._arrives) + 1))
            self._arrives.insert(place, (HOSTILE, raw))

    def is_there(self, client_id: int) -> bool:
        return True

    def receive(self, timeout_s: float, waiting_for: str, *_: object) -> tuple[int, bytes]:
        if not self._arrives:
            raise StallError(f"nothing moved for {timeout_s} s while waiting for {waiting_for}")
        return self._arrives.popleft()

    def receive_until(self, *_: object) -> tuple[int, bytes] | None:
        return self._arrives.popleft() if self._arrives else None


def play_server(draw: Draw) -> Counter[str]:
    """Let one of four clients send what it likes: every round counts the others, and nobody twice."""
    found, counted = Counter[str](), list[list[int]]()
    plan = server_plan(CLIENTS, ROUNDS, int(draw.integers(0, 2)), min_updates=2, stall_timeout_s=1.0)
    hooks = Hooks(lambda _, updates, __: counted.append([u.client_id for u in updates]), lambda _: None)
    start = ServerStart(initial_server([torch.zeros(SIZE) for _ in range(BLOCKS)]))
    server = Server(start, plan, Answers(draw), Trace(RealClock()), hooks=hooks, on_mark=lambda *_: None)
    try:
        server.run()
        if not all(set(clients) >= set(range(HOSTILE)) for clients in counted):
            found["ended: a round lost honest updates"] += 1
        if any(len(set(clients)) != len(clients) for clients in counted):
            found["leak: an update counted twice"] += 1
    except Exception as error:
        found[f"foreign: {error!r:.60}"] += 1
    return found


# -- the client of rounds ----------------------------------------------------------------------------------------


class Over(Exception):  # noqa: N818
    """The sequence has ended."""


class Dictated:
    """A mailbox into which a server puts what it likes."""

    def __init__(self, said: Sequence[bytes]) -> None:
        self.said, self.sent = deque(said), list[bytes]()

    def __enter__(self) -> Dictated:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, message: bytes, round_index: int) -> None:
        self.sent.append(message)

    def receive(self) -> bytes:
        if not self.said:
            raise Over
        return self.said.popleft()


def from_a_hostile_server_of_rounds(draw: Draw) -> bytes:
    """Return a message that a server may send a client."""

    def number() -> int:
        return int(draw.integers(-1, ROUNDS + 1))

    def vector() -> Any:
        size = one_of([SIZE, SIZE, 1, 2 * SIZE], draw)
        return pack(torch.full((size,), float(draw.integers(3))), one_of(["float32", "bfloat16"], draw))

    kinds = ["value", "difference", "streamed", "stack"]
    news = tuple(
        messages.NewValue(number(), number(), 0.5, one_of(kinds, draw), vector())
        for _ in range(int(draw.integers(0, 3)))
    )
    fair = messages.RoundStart(number(), int(draw.integers(BLOCKS)), 1, 0, -1, ())
    every = [fair, fair, messages.RoundStart(number(), number(), number(), number(), number(), news)]
    every += [messages.Chunk(number(), number(), one_of(kinds[:3], draw), vector()), messages.Mark(2, stop=False)]
    every += [messages.Welcome(((number(), number()),)), messages.Skip(1), asking(0, (0, 1))]
    return to_bytes(one_of(every, draw))


def play_client(draw: Draw) -> Counter[str]:
    """Let a server send a client what it likes: it sends one update of a round."""
    found = Counter[str]()
    box = Dictated([from_a_hostile_server_of_rounds(draw) for _ in range(int(draw.integers(3, MOST)))])
    plan = ClientPlan("none", Differences(Encoding("float32")), 1)
    start = ClientStart(initial_client([torch.ones(SIZE) for _ in range(BLOCKS)]), rejoins=draw.random() < 0.2)
    client = Client(VICTIM, plan, Walks(VICTIM), box, Trace(RealClock()), start=start, warn=lambda _: None)
    try:
        client.run()
    except (Over, CodecError):
        pass
    except Exception as error:
        found[f"foreign: {error!r:.60}"] += 1
    sent: dict[int, set[bytes]] = defaultdict(set)
    for update in map(from_bytes, box.sent):
        if isinstance(update, Update):
            sent[update.round_index].add(unpack_bytes(update.delta))
    found.update(f"leak: {len(each)} updates of round {t}" for t, each in sent.items() if len(each) > 1)
    return found


class Walks(ToyTrainer):
    """A trainer whose update tells where it began."""

    def train(self, round_index: int, block_index: int, *rest: Any) -> Any:
        result = super().train(round_index, block_index, *rest[:-1], tuple(w.repeat(5)[:5] for w in rest[-1]))
        start = rest[-1][block_index].float()
        return replace(result, trained=start + 0.1 * start.square() + float(result.trained[0]))


PLAYS: dict[str, Callable[[Draw], Counter[str]]] = {
    "a masked client": play_masked_client,
    "the masked server": play_masked_server,
    "the server": play_server,
    "a client": play_client,
}
