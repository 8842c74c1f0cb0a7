"""One round's updates at the server: chunks come from any client in any order and are folded in client order.

Whoever takes part is folded as a whole or not at all. So a client that is taken out after some of its chunks
have been folded, because it went silent or sent something that no update can be, makes the fold begin again
without it; the chunks of the others are kept for that until the round is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median_high

import numpy as np
from torch import Tensor

from parablock.algorithm.aggregate import Aggregate
from parablock.algorithm.grid import GridAggregation
from parablock.algorithm.robust import RoundAggregation, scaled
from parablock.wire.messages import Update
from parablock.wire.quantize import WORDS, Encoding, Vector

ABSURD_NORM = 100.0
"""An update so many times longer than the round's median is refused."""

ABSURD_EXAMPLES = 10_000
"""An update that claims so many times the examples of the round's median is refused."""

MAX_EXAMPLES = 1 << 40
"""No client has more."""


@dataclass(frozen=True)
class Problem:
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
    """

    def __init__(
        self,
        round_index: int,
        block_index: int,
        asked: Mapping[int, int],
        cuts: Sequence[slice],
        begin: Callable[[], RoundAggregation],
    ) -> None:
        self.round_index, self.block_index = round_index, block_index
        self._cuts, self._asked = tuple(cuts), dict(asked)
        self._chunks: dict[int, dict[int, Vector]] = {client_id: {} for client_id in asked}
        self._squared_norms: dict[int, float] = dict.fromkeys(asked, 0.0)
        self._first: dict[int, Update] = {}
        self._noise: np.random.Generator | None = None
        self._begin, self._aggregation, self._num_folded = begin, begin(), 0
        self.out: dict[int, Problem] = {}
        self.began_again = False

    @property
    def expected(self) -> list[int]:
        """Who was asked and has not been taken out."""
        return list(self._chunks)

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has been folded."""
        return self._num_folded == len(self._cuts)

    @property
    def is_next_ready(self) -> bool:
        """Whether everybody who is expected has delivered the next chunk, or all where the rule needs that."""
        return bool(self._chunks) and not self.missing

    @property
    def is_last_next(self) -> bool:
        """Whether only one chunk is left to fold."""
        return self._num_folded == len(self._cuts) - 1

    @property
    def missing(self) -> list[int]:
        """The clients whose next chunk, or any, has not come."""
        until = len(self._cuts) if self._aggregation.needs_whole else self._num_folded + 1
        needed = range(self._num_folded, until)
        return [client_id for client_id, chunks in self._chunks.items() if any(k not in chunks for k in needed)]

    @property
    def delivered(self) -> list[int]:
        """The clients whose update is all there."""
        return [client_id for client_id, chunks in self._chunks.items() if len(chunks) == len(self._cuts)]

    @property
    def updates(self) -> list[Update]:
        """The first chunk that came of each update that counts, in client order."""
        return [self._first[client_id] for client_id in self._chunks if client_id in self._first]

    def progress_of(self, client_id: int) -> str:
        """Say how much of a client's update is there, in bytes of payload where some of it is."""
        chunks = self._chunks[client_id]
        came = sum(vector.raw.numel() for vector in chunks.values())
        return f"client {client_id}: {len(chunks)} of {len(self._cuts)} chunks, {came} bytes"

    def take(self, client_id: int, update: Update) -> Problem | None:
        """Take a chunk, or say why not; one that has come before changes nothing."""
        problem = self._misfit(client_id, update) or self._false_claim(client_id, update)
        if problem is not None:
            return problem
        if update.chunk_index in self._chunks[client_id]:
            return Problem("duplicate", f"chunk {update.chunk_index + 1} of round {self.round_index} again")
        values = update.delta.values.float()
        squared_norm = float(values.dot(values))
        if not isfinite(squared_norm):
            return Problem("not_finite", f"values that are not finite for block {self.block_index}")
        self._chunks[client_id][update.chunk_index] = update.delta
        self._squared_norms[client_id] += squared_norm
        self._first.setdefault(client_id, update)
        return None

    def _misfit(self, client_id: int, update: Update) -> Problem | None:
        index, count = update.chunk_index, len(self._cuts)
        if update.client_id != client_id:
            return Problem("foreign", f"an update in the name of client {update.client_id}")
        if update.block_index != self.block_index or update.num_chunks != count or not 0 <= index < count:
            return Problem(
                "misfit",
                f"chunk {index + 1} of {update.num_chunks} of block {update.block_index} for round "
                f"{self.round_index}, which trains block {self.block_index} in {count}",
            )
        size = self._cuts[index].stop - self._cuts[index].start
        if update.delta.num_elements != size:
            text = f"{update.delta.num_elements} parameters where block {self.block_index} has {size}"
            return Problem("misfit", text)
        if (update.delta.format in WORDS) != self._aggregation.on_grid:
            where = "on the grid" if self._aggregation.on_grid else "of floating-point numbers"
            return Problem("misfit", f"{update.delta.format} where updates are {where}")
        if update.num_local_steps != self._asked[client_id]:
            steps = self._asked[client_id]
            text = f"an update of {update.num_local_steps} local steps where {steps} were asked for"
            return Problem("misfit", text)
        return None

    def _false_claim(self, client_id: int, update: Update) -> Problem | None:
        first = self._first.get(client_id, update)
        if not 0 < update.num_examples <= MAX_EXAMPLES:
            return Problem("num_examples", f"an update of {update.num_examples} examples")
        if update.num_examples != first.num_examples:
            text = f"one update of {first.num_examples} and of {update.num_examples} examples"
            return Problem("num_examples", text)
        if not isfinite(update.train_loss):
            return Problem("not_finite", f"a training loss of {update.train_loss}")
        return None

    def forget(self, client_id: int) -> None:
        """Drop the chunks that a client has delivered, because it will send them anew."""
        self._begin_again_without(client_id)
        self._chunks[client_id] = {}
        self._chunks = dict(sorted(self._chunks.items()))
        self._squared_norms[client_id] = 0.0

    def take_out(self, client_id: int, problem: Problem) -> None:
        """Go on without a client: nothing that it sent, or will send, counts in this round."""
        self.out[client_id] = problem
        self._begin_again_without(client_id)

    def absurd(self) -> dict[int, Problem]:
        """Find whole updates that no honest client sends, beside those of the others.

        Not where the rule bounds them anyway and must not depend on one of them by more than that.
        """
        if self._aggregation.bounds_updates:
            return {}
        norms = {i: factor * sqrt(self._squared_norms[i]) for i, factor in self._evening().items()}
        examples = {client_id: self._first[client_id].num_examples for client_id in self._chunks}
        norm, most = median_high(norms.values()), median_high(examples.values())
        found = {}
        for client_id in self._chunks:
            if examples[client_id] > ABSURD_EXAMPLES * most:
                text = f"an update of {examples[client_id]} examples in a round whose median is {most}"
                found[client_id] = Problem("num_examples", text)
            elif norms[client_id] > ABSURD_NORM * norm > 0:
                text = f"an update of norm {norms[client_id]:.3g} in a round whose median is {norm:.3g}"
                found[client_id] = Problem("norm", text)
        return found

    def fold_next(self) -> tuple[slice, Tensor]:
        """Fold the next chunk of all clients; gives where it lies, and Δ̄ there."""
        index, factors = self._num_folded, self._evening()
        if index == 0 and self._aggregation.needs_whole:
            whole = range(len(self._cuts))
            self._aggregation.look_at(
                {i: [self._numbers(chunks[k], factors[i]) for k in whole] for i, chunks in self._chunks.items()}
            )
        deltas = {
            i: (self._numbers(chunks[index], factors[i]), self._first[i].num_examples)
            for i, chunks in self._chunks.items()
        }
        self._num_folded += 1
        return self._cuts[index], self._aggregation.fold(deltas)

    def unmask(self, masks_of: Callable[[int, Sequence[int], int], Tensor]) -> None:
        """Get the masks of all that will be folded, before that; see `Collector.masks_of`."""
        assert isinstance(self._aggregation, GridAggregation)
        self._aggregation.unmask(masks_of(self.round_index, self.expected, self._cuts[0].stop))

    def _numbers(self, vector: Vector, factor: float) -> Tensor:
        return vector.values if self._aggregation.on_grid else scaled(vector.values.float(), factor)

    def _evening(self) -> dict[int, float]:
        """Give K̄ / K_i for everybody who is folded, so that nobody has more say for more steps.

        K̄ is the mean of the K_i with the weights of the mean of the updates. All factors are 1 where all take
        as many steps.

        Source: Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated
        Optimization, 2020 (FedNova).
        """
        examples = {i: self._first[i].num_examples for i in self._chunks}
        mean = sum(n * self._asked[i] for i, n in examples.items()) / sum(examples.values())
        return {i: mean / self._asked[i] for i in examples}

    def aggregate(self) -> Aggregate:
        """Give the aggregate of all chunks."""
        return self._aggregation.aggregate()

    def noise(self, encoding: Encoding, server_id: int) -> np.random.Generator | None:
        """Give the draws that round this round's new value; they go on from chunk to chunk."""
        if self._noise is None:
            self._noise = encoding.noise(self.round_index, server_id)
        return self._noise

    def _begin_again_without(self, client_id: int) -> None:
        del self._chunks[client_id]
        self._first.pop(client_id, None)
        self.began_again = self.began_again or self._num_folded > 0
        self._aggregation, self._num_folded, self._noise = self._begin(), 0, None
