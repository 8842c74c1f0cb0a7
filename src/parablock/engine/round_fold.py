"""One round's updates at the server: chunks come from any client in any order and are folded in client order.

Whoever takes part is folded as a whole or not at all. So a client that is taken out after some of its chunks
have been folded, because it went silent or sent something that no update can be, makes the fold begin again
without it; the chunks of the others are kept for that until the round is committed, most of them outside memory.
What is folded is read part by part, the same part of every update, so that memory is a few times the block at
most, and does not grow with the clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from statistics import median_high

import numpy as np
import torch
from torch import Tensor

from parablock.algorithm.aggregate import PIECE, SLICE, Aggregate
from parablock.algorithm.fixed_point import FixedPointAggregation
from parablock.algorithm.robust import RoundAggregation, scale
from parablock.engine.update_store import SamePart, UpdateStore, WholeUpdate
from parablock.errors import CodecError
from parablock.wire.messages import Update
from parablock.wire.quantize import WORDS, Encoding, Vector, pack

MAX_NORM_RATIO = 100.0
"""An update so many times longer than the round's median is refused."""

MAX_EXAMPLES_RATIO = 10_000
"""An update that claims so many times the examples of the round's median is refused."""

MAX_EXAMPLES = 1 << 40
"""No client has more."""

READ_ELEMENTS = 1 << 22
"""Elements that are read at a time, of all updates together; at least a piece of each."""

IN_MEMORY_BYTES = 64 << 20
"""How much of a round's updates stays in memory."""

_NOTHING = pack(torch.empty(0), "float32")


@dataclass(frozen=True)
class Refusal:
    """Why an update is refused.

    Attributes:
        reason: One word, for counting.
        text: What is wrong, as the end of "client 3 sent …".
    """

    reason: str
    text: str


class RoundFold:
    """The updates of one round as far as they have come.

    Args:
        round_index: The round.
        block_index: Its block.
        asked: Who was asked, ascending, each for how many local steps K.
        cuts: Where the block is cut into chunks.
        begin: Makes what makes one of the updates.
        folder: Where updates are kept that do not fit into the memory for them; None: with temporary files.
    """

    def __init__(
        self,
        round_index: int,
        block_index: int,
        asked: Mapping[int, int],
        cuts: Sequence[slice],
        begin: Callable[[], RoundAggregation],
        folder: Path | None = None,
    ) -> None:
        self.round_index, self.block_index = round_index, block_index
        self._cuts, self._asked = tuple(cuts), dict(asked)
        self._spool = UpdateStore(folder, IN_MEMORY_BYTES)
        self._came: dict[int, dict[int, int]] = {client_id: {} for client_id in asked}
        self._squared_norms: dict[int, float] = dict.fromkeys(asked, 0.0)
        self._first: dict[int, Update] = {}
        self._noise: np.random.Generator | None = None
        self._mean: Tensor | None = None
        self._begin, self._aggregation, self._num_folded = begin, begin(), 0
        self.out: dict[int, Refusal] = {}
        self.began_again = False

    @property
    def expected(self) -> list[int]:
        """Who was asked and has not been taken out."""
        return list(self._came)

    @property
    def file_bytes(self) -> int:
        """How much of the updates is kept outside memory."""
        return self._spool.file_bytes

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has been folded."""
        return self._num_folded == len(self._cuts)

    @property
    def is_next_ready(self) -> bool:
        """Whether everybody who is expected has delivered the next chunk, or all where the rule needs that."""
        return bool(self._came) and not self.missing

    @property
    def is_last_next(self) -> bool:
        """Whether only one chunk is left to fold."""
        return self._num_folded == len(self._cuts) - 1

    @property
    def missing(self) -> list[int]:
        """The clients whose next chunk, or any, has not come."""
        until = len(self._cuts) if self._aggregation.needs_whole else self._num_folded + 1
        needed = range(self._num_folded, until)
        return [client_id for client_id, chunks in self._came.items() if any(k not in chunks for k in needed)]

    @property
    def delivered(self) -> list[int]:
        """The clients whose update is all there."""
        return [client_id for client_id, chunks in self._came.items() if len(chunks) == len(self._cuts)]

    @property
    def updates(self) -> list[Update]:
        """What the first chunk that came of each update that counts says, without its elements; in client order."""
        return [self._first[client_id] for client_id in self._came if client_id in self._first]

    def progress_of(self, client_id: int) -> str:
        """Say how much of a client's update is there, in bytes of payload where some of it is."""
        chunks = self._came[client_id]
        return f"client {client_id}: {len(chunks)} of {len(self._cuts)} chunks, {sum(chunks.values())} bytes"

    def take(self, client_id: int, update: Update) -> Refusal | None:
        """Take a chunk, or say why not; one that has come before changes nothing.

        Raises:
            StorageError: It has to be kept outside memory, and the disk has no room for it.
        """
        problem = self._misfit(client_id, update) or self._false_claim(client_id, update)
        if problem is not None:
            return problem
        if update.chunk_index in self._came[client_id]:
            return Refusal("duplicate", f"chunk {update.chunk_index + 1} of round {self.round_index} again")
        squared_norm = _squared_norm(update.delta)
        if not isfinite(squared_norm):
            return Refusal("not_finite", f"values that are not finite for block {self.block_index}")
        self._spool.put(client_id, update.chunk_index, update.delta)
        self._came[client_id][update.chunk_index] = update.delta.raw.numel()
        self._squared_norms[client_id] += squared_norm
        self._first.setdefault(client_id, replace(update, delta=_NOTHING))
        return None

    def _misfit(self, client_id: int, update: Update) -> Refusal | None:
        index, count = update.chunk_index, len(self._cuts)
        if update.client_id != client_id:
            return Refusal("foreign", f"an update in the name of client {update.client_id}")
        if update.block_index != self.block_index or update.num_chunks != count or not 0 <= index < count:
            return Refusal(
                "misfit",
                f"chunk {index + 1} of {update.num_chunks} of block {update.block_index} for round "
                f"{self.round_index}, which trains block {self.block_index} in {count}",
            )
        size = self._cuts[index].stop - self._cuts[index].start
        if update.delta.num_elements != size:
            text = f"{update.delta.num_elements} parameters where block {self.block_index} has {size}"
            return Refusal("misfit", text)
        if (update.delta.format in WORDS) != self._aggregation.on_grid:
            where = "on the grid" if self._aggregation.on_grid else "of floating-point numbers"
            return Refusal("misfit", f"{update.delta.format} where updates are {where}")
        if update.num_local_steps != self._asked[client_id]:
            steps = self._asked[client_id]
            text = f"an update of {update.num_local_steps} local steps where {steps} were asked for"
            return Refusal("misfit", text)
        return None

    def _false_claim(self, client_id: int, update: Update) -> Refusal | None:
        first = self._first.get(client_id, update)
        if not 0 < update.num_examples <= MAX_EXAMPLES:
            return Refusal("num_examples", f"an update of {update.num_examples} examples")
        if update.num_examples != first.num_examples:
            text = f"one update of {first.num_examples} and of {update.num_examples} examples"
            return Refusal("num_examples", text)
        if not isfinite(update.train_loss):
            return Refusal("not_finite", f"a training loss of {update.train_loss}")
        return None

    def forget(self, client_id: int) -> None:
        """Drop the chunks that a client has delivered, because it will send them anew."""
        self._begin_again_without(client_id)
        self._came[client_id] = {}
        self._came = dict(sorted(self._came.items()))
        self._squared_norms[client_id] = 0.0

    def take_out(self, client_id: int, problem: Refusal) -> None:
        """Go on without a client: nothing that it sent, or will send, counts in this round."""
        self.out[client_id] = problem
        self._begin_again_without(client_id)

    def check_that_somebody_fits(self) -> None:
        """Find out that nobody is left because everybody sent what does not fit the round.

        Raises:
            CodecError: So it is.
        """
        if not self._came and all(problem.reason == "misfit" for problem in self.out.values()):
            client_id, problem = list(self.out.items())[-1]
            raise CodecError(
                f"every update of round {self.round_index} was refused: client {client_id} sent {problem.text}",
                cause="The clients run another configuration or another model than the server.",
                remedy="Give all clients the same configuration and the same base model.",
            )

    def absurd(self) -> dict[int, Refusal]:
        """Find whole updates that no honest client sends, beside those of the others.

        Not where the rule bounds them anyway and must not depend on one of them by more than that.
        """
        if self._aggregation.bounds_updates:
            return {}
        norms = {i: factor * sqrt(self._squared_norms[i]) for i, factor in self._evening().items()}
        examples = {client_id: self._first[client_id].num_examples for client_id in self._came}
        norm, most = median_high(norms.values()), median_high(examples.values())
        found = {}
        for client_id in self._came:
            if examples[client_id] > MAX_EXAMPLES_RATIO * most:
                text = f"an update of {examples[client_id]} examples in a round whose median is {most}"
                found[client_id] = Refusal("num_examples", text)
            elif norms[client_id] > MAX_NORM_RATIO * norm > 0:
                text = f"an update of norm {norms[client_id]:.3g} in a round whose median is {norm:.3g}"
                found[client_id] = Refusal("norm", text)
        return found

    def fold_next(self) -> tuple[slice, Tensor]:
        """Fold the next chunk of all clients; gives where it lies, and Δ̄ there."""
        index, factors, aggregation = self._num_folded, self._evening(), self._aggregation
        cut = self._cuts[index]
        if index == 0 and aggregation.needs_whole:
            aggregation.look_at({i: WholeUpdate(partial(self._whole, i, factors[i])) for i in self._came})
        self._num_folded += 1
        if not aggregation.folds_parts:
            return cut, self._fold_part(index, slice(0, cut.stop - cut.start), factors)
        if self._mean is None:
            self._mean = torch.empty(self._cuts[-1].stop)
            aggregation.fold_into(self._mean)
        for part in self._parts(cut):
            self._fold_part(index, part, factors)
        return cut, self._mean[cut]

    def _fold_part(self, index: int, part: slice, factors: Mapping[int, float]) -> Tensor:
        return self._aggregation.fold(SamePart(partial(self._read, index, part, factors), self.expected))

    def _parts(self, cut: slice) -> list[slice]:
        """Cut a chunk into what is read of each update at a time."""
        size = cut.stop - cut.start
        step = max(1, READ_ELEMENTS // (PIECE * len(self._came))) * PIECE
        return [slice(first, min(first + step, size)) for first in range(0, size or 1, step)]

    def _read(self, index: int, part: slice, factors: Mapping[int, float], client_id: int) -> tuple[Tensor, int]:
        """Give a part of a chunk of an update, and the examples behind it."""
        numbers = self._numbers(self._spool.read(client_id, index, part), factors[client_id])
        return numbers, self._first[client_id].num_examples

    def _whole(self, client_id: int, factor: float) -> Iterator[Tensor]:
        """Give a whole update part by part."""
        for index, cut in enumerate(self._cuts):
            for part in self._parts(cut):
                yield self._numbers(self._spool.read(client_id, index, part), factor)

    def unmask(self, masks_of: Callable[[int, Sequence[int], int], Tensor]) -> None:
        """Get the masks of all that will be folded, before that; see `MaskedServer.masks_of`."""
        assert isinstance(self._aggregation, FixedPointAggregation)
        self._aggregation.unmask(masks_of(self.round_index, self.expected, self._cuts[0].stop))

    def _numbers(self, vector: Vector, factor: float) -> Tensor:
        return vector.values if self._aggregation.on_grid else scale(vector.values.float(), factor)

    def _evening(self) -> dict[int, float]:
        """Give K̄ / K_i for everybody who is folded, so that nobody has more say for more steps.

        K̄ is the mean of the K_i with the weights of the mean of the updates. All factors are 1 where all take
        as many steps.

        Source: Wang et al., Tackling the Objective Inconsistency Refusal in Heterogeneous Federated
        Optimization, 2020 (FedNova).
        """
        examples = {i: self._first[i].num_examples for i in self._came}
        mean = sum(n * self._asked[i] for i, n in examples.items()) / sum(examples.values())
        return {i: mean / self._asked[i] for i in examples}

    def aggregate(self) -> Aggregate:
        """Give the aggregate of all chunks; nothing can be taken out after this."""
        self._spool.close()
        return self._aggregation.aggregate()

    def close(self) -> None:
        """Let go of the updates: the round is committed, or void, or the server ends."""
        self._spool.close()

    def noise(self, encoding: Encoding, server_id: int) -> np.random.Generator | None:
        """Give the draws that round this round's new value; they go on from chunk to chunk."""
        if self._noise is None:
            self._noise = encoding.noise(self.round_index, server_id)
        return self._noise

    def _begin_again_without(self, client_id: int) -> None:
        del self._came[client_id]
        self._spool.drop(client_id)
        self._first.pop(client_id, None)
        self.began_again = self.began_again or self._num_folded > 0
        self._aggregation, self._num_folded, self._noise, self._mean = self._begin(), 0, None, None


def _squared_norm(vector: Vector) -> float:
    """Give ‖Δ‖² of a chunk, to some digits; not finite where an element is not."""
    squares = 0.0
    for first in range(0, vector.num_elements, 4 * SLICE):
        values = vector.part(slice(first, min(first + 4 * SLICE, vector.num_elements))).values.float()
        squares += float(values.dot(values))
    return squares
