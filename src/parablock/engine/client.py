"""The client of a run: it takes rounds from the server, trains, and sends its updates.

Its compute thread runs `Client.run`; its communication thread belongs to the `Pipeline`. With delay 0 the
server sends the next round after the commit of this one, so the client waits for the exchange; with delay 1 the
next round is already there, and the exchange happens while it trains. The code is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from parablock.algorithm.parablock import (
    ClientState,
    Commit,
    ServerState,
    commit,
    put_in_flight,
    working_parameters,
)
from parablock.engine.faults import NO_FAULTS, Faults
from parablock.engine.plans import ClientPlan, ClientStart
from parablock.engine.update_form import EncodedUpdate, LocalUpdate, UpdateForm
from parablock.errors import CodecError, TrainingError
from parablock.storage.checkpoint import ClientSnapshot
from parablock.storage.release_ledger import RELEASE, fingerprint
from parablock.trace import Trace
from parablock.wire.messages import (
    Chunk,
    Finish,
    Join,
    Mark,
    Message,
    NewValue,
    RoundStart,
    Skip,
    Update,
    Welcome,
    from_bytes,
    to_bytes,
)
from parablock.wire.quantize import Vector

if TYPE_CHECKING:
    from parablock.training.trainer import Trainer


MOST_TOLD = 100  # refused messages
WARN_LOST_SHARE = 0.9
"""The lost share of an update above which a client warns."""


class Communication(Protocol):
    """The compute thread's end of the communication thread."""

    def send(self, message: bytes, round_index: int) -> None:
        """Hand an update over; returns at once."""

    def receive(self) -> bytes | Message:
        """Wait for the next message of the server; it may be decoded already."""


class Client:
    """One client of a run.

    Args:
        client_id: 0 … num_clients − 1.
        plan: The settings of all clients.
        trainer: The client's local training.
        pipeline: The communication thread; entered and left by `run`.
        trace: Records the computation.
        start: The state to begin from.
        hand_in: Takes snapshots, from the compute thread.
        faults: The faults to inject.
        warn: Called once for each block of whose update little is left, and for each message that is refused.

    Attributes:
        refused: Number of messages of the server that were refused.
    """

    def __init__(
        self,
        client_id: int,
        plan: ClientPlan,
        trainer: Trainer,
        pipeline: AbstractContextManager[Communication],
        trace: Trace,
        *,
        start: ClientStart,
        warn: Callable[[str], None],
        hand_in: Callable[[int, ClientSnapshot], None] = lambda *_: None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self.client_id, self.state, self._plan, self._trainer = client_id, start.state, plan, trainer
        self._entered, self._trace, self._hand_in, self._faults = pipeline, trace, hand_in, faults
        self._sent, self._residuals, self._rejoins = dict(start.sent), dict(start.residuals), start.rejoins
        self._releases, self._newest, self.refused = start.releases, max(self._sent, default=-1), 0
        self.has_finished = False
        self._protection, self._warn, self._warned = plan.protection_of(client_id), warn, set[int]()
        self._chunks: dict[tuple[int, int], tuple[str, list[Vector]]] = {}
        if start.memory is not None:
            trainer.remember(dict(start.memory))

    def run(self, keep: Callable[[Callable[[], None]], None] = lambda record: record()) -> None:
        """Serve until the server ends the run.

        `keep` is called before each update leaves: a client that goes on from the state and the `snapshot` of that
        moment sends the same bytes again. It gets a function that records the release, to be called once that state
        is kept and before the update leaves.
        """
        with self._entered as pipeline:
            self._pipeline, self._keep = pipeline, keep
            self._record_kept()
            if self._rejoins:
                pipeline.send(to_bytes(Join(self.state.versions, tuple(self._sent))), max(self._sent, default=0))
            else:
                self._send_again((t, 0) for t in self._sent)
            try:
                while self._serve(_decoded(pipeline.receive())):
                    pass
            finally:
                del self._keep  # which may hold this client

    def _send_again(self, updates: Iterable[tuple[int, int]]) -> None:
        """Send updates in flight: of each round the chunks from one on."""
        for t, first in updates:
            for chunk in self._sent.get(t, ())[max(0, first) :]:
                self._pipeline.send(chunk, t)

    def _serve(self, message: Message) -> bool:
        """Do what a message asks for; return False after the last one."""
        match message:
            case Mark():
                self._hand_in(message.round_index, self.snapshot())
                return not message.stop
            case Finish():
                self.has_finished = True
                # if the server has not noticed the restart, differences do not fit the restored blocks
                if not self._rejoins or all(new.kind == "value" for new in message.news):
                    self._commit(message.news, message.committed)
                return False
            case Welcome() if not self._rejoins:
                self._refuse("a Welcome that answers nothing")
            case Welcome():
                self._rejoins = False
                self._send_again(message.lacking)
            case RoundStart() | Chunk() if self._rejoins:
                pass  # meant for the state before the restart
            case RoundStart():
                self._round(message)
            case Chunk():
                self._take_chunk(message)
            case _:
                self._refuse(f"a {type(message).__name__}, which only a server gets")
        return True

    def _refuse(self, problem: str) -> None:
        self.refused += 1
        if self.refused <= MOST_TOLD:
            self._warn(f"client {self.client_id} refuses what the server sent: {problem}")

    def _take_chunk(self, chunk: Chunk) -> None:
        """Keep a part of a new value; the newest d + 1 values of a block may be under way, older ones are void."""
        b, place = chunk.block_index, (chunk.block_index, chunk.version)
        if not 0 <= b < len(self.state.base):
            self._refuse(f"a part of block {b} of {len(self.state.base)}")
            return
        ahead = sorted({chunk.version} | {version for block, version in self._chunks if block == b})
        newest = ahead[-self._plan.num_ahead :]
        self._chunks = {at: parts for at, parts in self._chunks.items() if at[0] != b or at[1] in newest}
        if chunk.version not in newest:
            return
        kind, parts = self._chunks.setdefault(place, (chunk.kind, []))
        longest = max(self.state.base[b].numel(), self._plan.form.num_elements(self.state.base[b].numel()))
        if kind != chunk.kind or sum(part.num_elements for part in parts) + chunk.vector.num_elements > longest:
            self._refuse(f"a part too many of block {b}")
            return
        parts.append(chunk.vector)

    @property
    def is_rejoining(self) -> bool:
        """Whether the server has not yet answered that the client is back."""
        return self._rejoins

    def snapshot(self) -> ClientSnapshot:
        """Return the client's part of a checkpoint."""
        state, sent, residuals = self.state, dict(self._sent), dict(self._residuals)
        return ClientSnapshot(self.client_id, state.versions, state.rho, sent, self._trainer.memory(), residuals)

    def _unfit(self, start: RoundStart) -> str:
        """Return why a round cannot be trained; empty if it can. A round is trained once."""
        t, b = start.round_index, start.block_index
        if t <= self._newest or t < 0:
            return f"round {t + 1}, after round {self._newest + 1}"
        if t - start.committed > (open_rounds := self._plan.num_ahead):
            return f"round {t + 1}, where {start.committed + 1} are committed, and {open_rounds} may be open"
        if not 0 <= b < len(self.state.base) or start.num_local_steps < 1:
            return f"round {t + 1} with {start.num_local_steps} local steps on block {b} of {len(self.state.base)}"
        return ""

    def _round(self, start: RoundStart) -> None:
        if unfit := self._unfit(start):
            self._refuse(unfit)
            return
        t, b = start.round_index, start.block_index
        self._newest = t
        self._faults.strike(self.client_id, t, "commit", self._trace.clock)
        self._commit(start.news, start.committed)
        if self._faults.strike(self.client_id, t, "train", self._trace.clock) == "drop":
            self._pipeline.send(to_bytes(Skip(t)), t)
            return
        step_time_s = self._trainer.step_time_s
        modelled_s = None if step_time_s is None else step_time_s * start.num_local_steps
        with self._trace.span(self.client_id, "compute", "computing", round_index=t, block_index=b):
            began = self._trace.clock.now()
            with self._trace.clock.working(modelled_s):
                try:
                    train_loss, encoded = self._train(start)
                except TrainingError as error:  # the server decides whether the others are enough
                    self._pipeline.send(to_bytes(Skip(t, error.what)), t)
                    return
            compute_s = self._trace.clock.now() - began
        is_strict = self._releases is not None and self._releases.is_strict
        hash_ = fingerprint(encoded.chunks) if is_strict else ""
        if self._releases is not None and not self._releases.may_release(t, hash_):
            self._refuse(f"round {t + 1} once more: another update of it has been released before")
            self._pipeline.send(to_bytes(Skip(t)), t)
            return
        messages = [
            to_bytes(
                Update(
                    round_index=t,
                    block_index=b,
                    client_id=self.client_id,
                    num_examples=self._trainer.num_examples,
                    committed=start.committed,
                    train_loss=train_loss,
                    num_local_steps=start.num_local_steps,
                    compute_s=compute_s,
                    chunk_index=index,
                    num_chunks=len(encoded.chunks),
                    delta=chunk,
                )
            )
            for index, chunk in enumerate(encoded.chunks)
        ]
        self.state = put_in_flight(self.state, t, b, encoded.seen)
        self._sent[t] = messages
        self._keep(partial(self._record, t, hash_, encoded.chunks))
        self._send_again([(t, 0)])

    def _record_kept(self) -> None:
        """Record updates that a process kept, and had not recorded when it died; they leave again now."""
        for t, messages in self._sent.items():
            if self._releases is not None and not self._releases.recorded(RELEASE, t):
                updates = (from_bytes(message) for message in messages)
                self._record(t, "", [update.delta for update in updates if isinstance(update, Update)])

    def _record(self, round_index: int, sha256: str, chunks: list[Vector]) -> None:
        if self._releases is not None:
            self._releases.record(RELEASE, round_index, sha256=sha256 or fingerprint(chunks))

    def _train(self, start: RoundStart) -> tuple[float | None, EncodedUpdate]:
        """Take the local steps; return their loss and the encoded update."""
        t, b = start.round_index, start.block_index
        v = working_parameters(self.state, self._plan.in_flight, self._plan.num_updates, self._plan.form.kinds)
        result = self._trainer.train(t, b, start.num_local_steps, start.steps_before, v)
        local = LocalUpdate(t, self.client_id, result.trained, v[b], self._residuals.get(b), self._protection)
        encoded = self._plan.form.encode(local)
        if encoded.residual is not None:
            self._residuals[b] = encoded.residual
        for share, text in encoded.losses:
            if share > WARN_LOST_SHARE and b not in self._warned:
                self._warned.add(b)
                self._warn(f"client {self.client_id}, block {b}: {text.format(share)} of its update")
        return result.train_loss, encoded

    def _commit(self, news: tuple[NewValue, ...], committed: int) -> None:
        commits, values = list[Commit](), dict(enumerate(self.state.base))
        for new in news:
            b = new.block_index
            kind, vectors = new.kind, [new.vector]
            if kind == "streamed":
                kind, vectors = self._chunks.pop((b, new.version), ("value", []))
            if not 0 <= b < len(self.state.base) or not vectors:
                raise CodecError(
                    f"client {self.client_id} received a commit of block {b} without its value",
                    cause="The server runs another configuration, or forgets what it has sent.",
                )
            self._chunks = {
                place: parts for place, parts in self._chunks.items() if place[0] != b or place[1] > new.version
            }
            values[b] = self._plan.form.new_value(values[b], b, kind, vectors)
            commits.append(Commit(b, new.version, values[b], new.rho))
        self.state = commit(self.state, commits, committed)
        self._sent = {own.round_index: self._sent[own.round_index] for own in self.state.in_flight}


def _decoded(message: bytes | Message) -> Message:
    return from_bytes(message) if isinstance(message, bytes) else message


def restore_client(
    snapshot: ClientSnapshot, server: ServerState, form: UpdateForm, *, rejoins: bool = False
) -> ClientStart:
    """Return a client's start from its snapshot and the server's state at the same round.

    A block of an old version takes the server's value for now: the server sends it before the client trains again.
    Updates that the server has committed are not sent again.
    """
    state = ClientState(server.view, snapshot.versions, snapshot.rho)
    sent = {t: messages for t, messages in sorted(snapshot.sent.items()) if t > server.committed}
    for t, messages in sent.items():
        deltas = [update.delta for update in map(from_bytes, messages) if isinstance(update, Update)]
        state = put_in_flight(state, t, server.history[t], form.decode(deltas))
    return ClientStart(state, sent, snapshot.residuals, snapshot.memory, rejoins)
