"""One round's updates at the server: chunks come from any client in any order and are folded in client order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from parablock.algorithm.aggregate import Aggregate
from parablock.algorithm.robust import RoundAggregation, Rule
from parablock.wire.messages import Update
from parablock.wire.quantize import Encoding, Vector


class RoundFold:
    """The updates of one round as far as they have come.

    What has been folded is dropped; what is ahead of the slowest client is kept as the bytes that came.

    Args:
        round_index: The round.
        block_index: Its block.
        cohort: Who was asked, ascending.
        cuts: Where the block is cut into chunks.
        rule: How the updates become one.
    """

    def __init__(
        self,
        round_index: int,
        block_index: int,
        cohort: Sequence[int],
        cuts: Sequence[slice],
        rule: Rule = Rule(),  # noqa: B008
    ) -> None:
        self.round_index, self.block_index = round_index, block_index
        self._cohort, self._cuts = tuple(cohort), tuple(cuts)
        self._chunks: dict[int, dict[int, Vector]] = {client_id: {} for client_id in cohort}
        self._last: dict[int, Update] = {}
        self._noise: np.random.Generator | None = None
        self._aggregation, self._num_folded = RoundAggregation(rule), 0

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has been folded."""
        return self._num_folded == len(self._cuts)

    @property
    def is_next_ready(self) -> bool:
        """Whether every client has delivered the next chunk, or all of them where the rule needs whole updates."""
        return not self.missing

    @property
    def missing(self) -> list[int]:
        """The clients whose next chunk, or any, has not come."""
        until = len(self._cuts) if self._aggregation.needs_whole else self._num_folded + 1
        needed = range(self._num_folded, until)
        return [client_id for client_id, chunks in self._chunks.items() if any(k not in chunks for k in needed)]

    @property
    def updates(self) -> list[Update]:
        """The last chunk of every client's update, in client order."""
        return [self._last[client_id] for client_id in self._cohort]

    def problem_with(self, client_id: int, update: Update) -> str:
        """Say what is wrong with a chunk, or nothing."""
        index, count = update.chunk_index, len(self._cuts)
        if client_id not in self._chunks:
            return f"an update of round {update.round_index}, which it was not asked for"
        if update.client_id != client_id:
            return f"an update in the name of client {update.client_id}"
        if update.block_index != self.block_index or update.num_chunks != count or not 0 <= index < count:
            return (
                f"chunk {index + 1} of {update.num_chunks} of block {update.block_index} for round "
                f"{self.round_index}, which trains block {self.block_index} in {count}"
            )
        size = self._cuts[index].stop - self._cuts[index].start
        if update.delta.num_elements != size:
            return f"{update.delta.num_elements} parameters where block {self.block_index} has {size}"
        return "" if update.num_examples > 0 else f"an update of {update.num_examples} examples"

    def add(self, update: Update) -> None:
        """Take a chunk; one that has come before changes nothing."""
        if update.chunk_index >= self._num_folded:
            self._chunks[update.client_id][update.chunk_index] = update.delta
            self._last[update.client_id] = update

    def fold_next(self) -> tuple[slice, Tensor]:
        """Fold the next chunk of all clients, and forget it; gives where it lies, and Δ̄ there."""
        index = self._num_folded
        if index == 0 and self._aggregation.needs_whole:
            whole = range(len(self._cuts))
            self._aggregation.look_at(
                {i: [chunks[k].values.float() for k in whole] for i, chunks in self._chunks.items()}
            )
        deltas = {
            client_id: (chunks.pop(index).values.float(), self._last[client_id].num_examples)
            for client_id, chunks in self._chunks.items()
        }
        self._num_folded += 1
        return self._cuts[index], self._aggregation.fold(deltas)

    def aggregate(self) -> Aggregate:
        """Give the aggregate of all chunks."""
        return self._aggregation.aggregate()

    def noise(self, encoding: Encoding, server_id: int) -> np.random.Generator | None:
        """Give the draws that round this round's new value; they go on from chunk to chunk."""
        if self._noise is None:
            self._noise = encoding.noise(self.round_index, server_id)
        return self._noise
