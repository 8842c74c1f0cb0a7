"""The client of a run: it takes rounds from the server, trains, and sends its updates.

Its compute thread runs `Client.run`; its communication thread belongs to the `Pipeline`. With delay 0 the
server sends the next round after the commit of this one, so the client waits for the exchange; with delay 1 the
next round is already there, and the exchange happens while it trains. The code is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
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


WARN_LOST_SHARE = 0.9
"""The lost share of an update above which a client warns."""


class Communication(Protocol):
    """The compute thread's end of the communication thread."""

    def send(self, message: bytes, round_index: int) -> None:
        """Hand an update over; returns at once."""

    def receive(self) -> bytes:
        """Wait for the next message of the server."""


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
        warn: Called once for each block of whose update little is left.
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
        self.has_finished = False
        self._protection, self._warn, self._warned = plan.protection_of(client_id), warn, set[int]()
        self._chunks: dict[tuple[int, int], tuple[str, list[Vector]]] = {}
        if start.memory is not None:
            trainer.remember(dict(start.memory))

    def run(self, keep: Callable[[], None] = lambda: None) -> None:
        """Serve until the server ends the run.

        `keep` is called before each update leaves: a client that goes on from the state and the `snapshot` of that
        moment sends the same bytes again.
        """
        with self._entered as pipeline:
            self._pipeline, self._keep = pipeline, keep
            if self._rejoins:
                pipeline.send(to_bytes(Join(self.state.versions, tuple(self._sent))), max(self._sent, default=0))
            else:
                self._send_again((t, 0) for t in self._sent)
            try:
                while self._serve(from_bytes(pipeline.receive())):
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
            case Welcome():
                self._rejoins = False
                self._send_again(message.lacking)
            case RoundStart() | Chunk() if self._rejoins:
                pass  # meant for the state before the restart
            case RoundStart():
                self._round(message)
            case Chunk():
                place = (message.block_index, message.version)
                self._chunks.setdefault(place, (message.kind, []))[1].append(message.vector)
            case _:
                kind = type(message).__name__
                raise CodecError(f"client {self.client_id} received a message of kind {kind}; only a server does")
        return True

    @property
    def is_rejoining(self) -> bool:
        """Whether the server has not yet answered that the client is back."""
        return self._rejoins

    @property
    def chunks_ahead(self) -> int:
        """Number of messages with parts of new values that no commit has used yet."""
        return sum(len(parts) for _, parts in self._chunks.values())

    def snapshot(self) -> ClientSnapshot:
        """Return the client's part of a checkpoint."""
        state, sent, residuals = self.state, dict(self._sent), dict(self._residuals)
        return ClientSnapshot(self.client_id, state.versions, state.rho, sent, self._trainer.memory(), residuals)

    def _round(self, start: RoundStart) -> None:
        t, b = start.round_index, start.block_index
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
        self._keep()
        self._send_again([(t, 0)])

    def _train(self, start: RoundStart) -> tuple[float, EncodedUpdate]:
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
        commits = []
        for new in news:
            b = new.block_index
            kind, vectors = new.kind, [new.vector]
            if kind == "streamed":
                kind, vectors = self._chunks.pop((b, new.version))
            self._chunks = {
                place: parts for place, parts in self._chunks.items() if place[0] != b or place[1] > new.version
            }
            value = self._plan.form.new_value(self.state.base[b], b, kind, vectors)
            commits.append(Commit(b, new.version, value, new.rho))
        self.state = commit(self.state, commits, committed)
        self._sent = {own.round_index: self._sent[own.round_index] for own in self.state.in_flight}


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
