"""A client: takes rounds from the server, trains, sends its updates.

Its compute thread runs `Client.run`; its communication thread belongs to the `Pipeline`. With delay 0 the
server sends the next round only after the commit of this one, so the client waits for the exchange; with
delay 1 the next round is already there, and the exchange happens while it trains. The code is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.parablock import (
    ClientState,
    Commit,
    ServerState,
    commit,
    delta_of,
    put_in_flight,
    working_parameters,
)
from parablock.algorithm.stacking import Factors
from parablock.engine.faults import NO_FAULTS, Faults
from parablock.errors import CodecError, TrainingError
from parablock.model.device_copy import ArrivingVector
from parablock.privacy.protection import Protection
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
    new_block_value,
    to_bytes,
)
from parablock.wire.quantize import QUANTIZED, Encoding, Vector, joined, pack

if TYPE_CHECKING:
    from parablock.training.trainer import Trainer


WARN_LOST_SHARE = 0.9
"""A client warns when so much of an update is lost before it leaves."""


@dataclass(frozen=True)
class _Delta:
    """Δ of a block, made part by part."""

    trained: ArrivingVector
    start: Tensor

    def __getitem__(self, part: slice, /) -> Tensor:
        return delta_of(self.trained[part], self.start[part])


class Communication(Protocol):
    """What the compute thread has of the communication thread."""

    def send(self, message: bytes, round_index: int) -> None:
        """Hand an update over; returns at once."""

    def receive(self) -> bytes:
        """Wait for the next message of the server."""


class Client:
    """One client of a run.

    Args:
        client_id: 0 … num_clients − 1.
        state: Where it starts: the initial parameters, or what `restore_client` made.
        trainer: Its local training.
        pipeline: Its communication thread; entered and left by `run`.
        trace: Where its computation is recorded.
        in_flight: own | aligned | none.
        encoding: How its updates become bytes.
        hand_in: Takes its snapshots, from the compute thread.
        sent: Updates in flight when the run was interrupted; they are sent again first.
        residuals: With error feedback, what rounding has kept back of each block.
        rejoins: It was gone while the run went on: it says what it holds before it takes part again.
        faults: What is to go wrong, for tests.
        protection: What its updates go through before they are encoded.
        grid: Its updates travel on this grid; None: in the wire's format.
        factors: Its updates are adapters, and news may be stacks of them; None: they are differences.
        warn: Told, once for each block, when little of an update is left.
    """

    def __init__(
        self,
        client_id: int,
        state: ClientState,
        trainer: Trainer,
        pipeline: AbstractContextManager[Communication],
        trace: Trace,
        *,
        in_flight: str,
        encoding: Encoding,
        hand_in: Callable[[int, ClientSnapshot], None],
        sent: dict[int, list[bytes]] | None = None,
        residuals: dict[int, Tensor] | None = None,
        rejoins: bool = False,
        faults: Faults = NO_FAULTS,
        protection: Protection | None = None,
        grid: FixedPointGrid | None = None,
        factors: Factors | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.client_id, self.state, self._trainer = client_id, state, trainer
        self._entered, self._trace = pipeline, trace
        self._in_flight, self._encoding, self._hand_in = in_flight, encoding, hand_in
        self._residuals = dict(residuals or {})
        self._protection, self._warn, self._warned = protection, warn, set[int]()
        self._grid, self._factors = grid, factors
        self._chunks: dict[tuple[int, int], tuple[str, list[Vector]]] = {}
        self._sent = dict(sent or {})
        self._rejoins, self._faults = rejoins, faults

    def run(self, on_served: Callable[[], None] = lambda: None) -> None:
        """Serve the server until it finishes or stops the run.

        Args:
            on_served: Called after each message but the last.
        """
        with self._entered as pipeline:
            self._pipeline = pipeline
            if self._rejoins:
                pipeline.send(to_bytes(Join(self.state.versions, tuple(self._sent))), max(self._sent, default=0))
            for round_index, chunks in self._sent.items():
                for chunk in chunks:
                    pipeline.send(chunk, round_index)
            while self._serve(from_bytes(pipeline.receive())):
                on_served()

    def _serve(self, message: Message) -> bool:
        """Do what a message asks for; False when it was the last one."""
        match message:
            case Mark():
                self._hand_in(message.round_index, self.snapshot())
                return not message.stop
            case Finish():
                # where the server has not noticed that it was gone, differences do not fit what it holds
                if not self._rejoins or all(new.kind == "value" for new in message.news):
                    self._commit(message.news, message.committed)
                return False
            case Welcome():
                self._rejoins = False
            case RoundStart() | Chunk() if self._rejoins:
                pass  # meant for what it held before it was gone
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
    def chunks_ahead(self) -> int:
        """How many messages have brought parts of new values that no commit has spoken of yet."""
        return sum(len(parts) for _, parts in self._chunks.values())

    def snapshot(self) -> ClientSnapshot:
        """Give what a checkpoint keeps of this client."""
        return ClientSnapshot(
            self.client_id,
            self.state.versions,
            self.state.rho,
            dict(self._sent),
            self._trainer.memory(),
            dict(self._residuals),
        )

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
                    train_loss, chunks, seen = self._train(start)
                except TrainingError as error:  # the server knows whether the others are enough
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
                    num_chunks=len(chunks),
                    delta=chunk,
                )
            )
            for index, chunk in enumerate(chunks)
        ]
        self.state = put_in_flight(self.state, t, b, seen)
        self._sent[t] = messages
        for message in messages:
            self._pipeline.send(message, t)

    def _train(self, start: RoundStart) -> tuple[float, list[Vector], Tensor]:
        """Take the local steps; give their loss, q(Δ) in chunks, and what the server will see of it."""
        t, b = start.round_index, start.block_index
        v = working_parameters(self.state, self._in_flight)
        result = self._trainer.train(t, b, start.num_local_steps, start.steps_before, v)
        if self._factors is not None:
            return result.train_loss, *self._encode(result.trained, result.trained[:].numel(), t, b)
        return result.train_loss, *self._encode(_Delta(result.trained, v[b]), v[b].numel(), t, b)

    def _encode(self, delta: ArrivingVector, size: int, t: int, b: int) -> tuple[list[Vector], Tensor]:
        """Make q(Δ) in chunks, or with error feedback q(Δ + e), keeping e ← Δ + e − q.

        Chunk by chunk, so that the first are encoded while the last are still on their way from the model's device.
        """
        if self._protection is not None:
            delta, factor = self._protection.apply(delta[:], t)
            self._warn_of_loss(b, 1 - factor, "clipping takes {:.1%} of the length")
        if self._grid is not None:
            words = pack(self._grid.encode(delta[:]), "word32")
            return [words], self._grid.decode(words.values)
        encoding, residual, moved, left = self._encoding, self._residuals.get(b), 0, 0
        noise, chunks = encoding.noise(t, self.client_id), list[Vector]()
        seen, kept_back = torch.empty(size), torch.empty(size if encoding.error_feedback else 0)
        for part in encoding.cut(size):
            exact = delta[part] if residual is None else delta[part] + residual[part]
            seen[part] = exact
            chunks.append(pack(seen[part], encoding.format, noise))  # float32: a view of what is seen, no copy
            if encoding.format != "float32":
                seen[part] = chunks[-1].values
            if encoding.format in QUANTIZED:
                moved, left = moved + int(exact.count_nonzero()), left + int(seen[part].count_nonzero())
            if encoding.error_feedback:
                torch.sub(exact, seen[part], out=kept_back[part])
        if moved:
            self._warn_of_loss(b, 1 - left / moved, "rounding makes zeros of {:.1%} of the elements")
        if encoding.error_feedback:
            self._residuals[b] = kept_back
        return chunks, seen

    def _warn_of_loss(self, b: int, lost: float, how: str) -> None:
        if lost > WARN_LOST_SHARE and b not in self._warned:
            self._warned.add(b)
            self._warn(f"client {self.client_id}, block {b}: {how.format(lost)} of its update")

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
            if kind == "stack":
                kind, vectors = "difference", [self._product(new.vector)]
            value = new_block_value(self.state.base[b], b, kind, vectors)
            commits.append(Commit(b, new.version, value, new.rho))
        self.state = commit(self.state, commits, committed)
        self._sent = {own.round_index: self._sent[own.round_index] for own in self.state.in_flight}

    def _product(self, stack: Vector) -> Vector:
        """Give the difference that a stack of adapters stands for."""
        if self._factors is None:
            raise CodecError(
                f"client {self.client_id} received a stack of adapters, and it trains none",
                cause="The server runs another method.",
                remedy="Give both the same configuration.",
            )
        return pack(self._factors.product(stack.values), "float32")


def decoded(chunks: Sequence[Vector], grid: FixedPointGrid | None) -> Tensor:
    """Give what the server sees of an update, or would see of it alone: flat, fp32."""
    return joined(chunks) if grid is None else grid.decode(chunks[0].values)


def restore_client(
    snapshot: ClientSnapshot, server: ServerState, grid: FixedPointGrid | None = None
) -> tuple[ClientState, dict[int, list[bytes]]]:
    """Make a client from its snapshot and the server's state at the same round.

    Blocks that the client had not seen take the server's value for now: the server sends them, as their
    versions say, before the client trains again.

    Returns:
        Its state, and the messages of its updates that the server has not committed.
    """
    state = ClientState(server.view, snapshot.versions, snapshot.rho)
    sent = {t: messages for t, messages in sorted(snapshot.sent.items()) if t > server.committed}
    for t, messages in sent.items():
        updates = [from_bytes(message) for message in messages]
        deltas = [update.delta for update in updates if isinstance(update, Update)]
        state = put_in_flight(state, t, server.history[t], decoded(deltas, grid))
    return state, sent
