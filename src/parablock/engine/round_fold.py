"""The fold of a round's updates at the server: chunks come in any order and are folded in client order.

A client's update counts as a whole or not at all. If a client is taken out after some of its chunks were folded,
the fold begins again without it. So all chunks are kept until the round is committed, most of them outside memory.
The fold reads the same part of every update at a time: memory is a few times the block, for any number of clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from math import isfinite, sqrt
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parablock.algorithm.aggregate import PIECE, Aggregate
from parablock.engine.refusals import Refusal
from parablock.engine.update_form import UpdateForm
from parablock.engine.update_store import SamePart, UpdateStore, WholeUpdate
from parablock.errors import CodecError, TrainingError
from parablock.storage.release_ledger import RunningHash, fingerprint
from parablock.wire.messages import Update
from parablock.wire.quantize import Encoding, pack
from parablock.wire.transport import MaskedTransport

MAX_NORM_RATIO = 100.0
"""Largest allowed ratio of an update's norm to the round's median."""

MAX_EXAMPLES_RATIO = 10_000
"""Largest allowed ratio of an update's examples to the round's median, and of examples times norm to theirs."""

MAX_EXAMPLES = 1 << 40
"""Largest allowed number of a client's examples."""

READ_ELEMENTS = 1 << 22
"""Elements read at a time, of all updates together; at least a piece of each."""

IN_MEMORY_BYTES = 64 << 20
"""Bytes of a round's updates that stay in memory."""

_NOTHING = pack(torch.empty(0), "float32")


class RoundFold:
    """The updates of one round, as far as they have come.

    Args:
        round_index: The round.
        block_index: The round's block.
        asked: Client → local steps K that it was asked for, in ascending order.
        num_parameters: The length of the block.
        form: The form of the updates.
        folder: The folder of updates that memory does not hold; None: that of temporary files.
        is_accounted: Whether the updates are counted by their hashes.
        max_examples: Largest weight of a client: more examples count as so many; None: no cap.
    """

    def __init__(
        self,
        round_index: int,
        block_index: int,
        asked: Mapping[int, int],
        num_parameters: int,
        form: UpdateForm,
        folder: Path | None = None,
        *,
        is_accounted: bool = False,
        max_examples: int | None = None,
    ) -> None:
        self.round_index, self.block_index = round_index, block_index
        self._form, self._cuts, self._asked = form, tuple(form.cuts(num_parameters)), dict(asked)
        self._max_examples = max_examples
        self._store = UpdateStore(folder, IN_MEMORY_BYTES)
        self._came: dict[int, dict[int, int]] = {client_id: {} for client_id in asked}
        self._hashes: dict[int, dict[int, str]] | None = (
            {client_id: {} for client_id in asked} if is_accounted else None
        )
        self._running = {client_id: RunningHash() for client_id in asked}
        self._squared_norms: dict[int, float] = dict.fromkeys(asked, 0.0)
        self._first: dict[int, Update] = {}
        self._noise: np.random.Generator | None = None
        self._mean: Tensor | None = None
        self._aggregation, self._num_folded = form.aggregation(round_index), 0
        self.out: dict[int, Refusal] = {}
        self.began_again = False

    @property
    def expected(self) -> list[int]:
        """The clients that were asked and have not been taken out."""
        return list(self._came)

    @property
    def file_bytes(self) -> int:
        """Bytes of updates outside memory."""
        return self._store.file_bytes

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has been folded."""
        return self._num_folded == len(self._cuts)

    @property
    def is_next_ready(self) -> bool:
        """Whether every expected client has delivered the next chunk, or all if the rule needs them."""
        return bool(self._came) and not self.missing

    @property
    def is_last_next(self) -> bool:
        """Whether one chunk is left to fold."""
        return self._num_folded == len(self._cuts) - 1

    @property
    def missing(self) -> list[int]:
        """The clients that have not delivered the next chunk, or all if the rule needs them."""
        until = len(self._cuts) if self._aggregation.needs_whole else self._num_folded + 1
        needed = range(self._num_folded, until)
        return [client_id for client_id, chunks in self._came.items() if any(k not in chunks for k in needed)]

    @property
    def delivered(self) -> list[int]:
        """The clients that have delivered every chunk."""
        return [client_id for client_id, chunks in self._came.items() if len(chunks) == len(self._cuts)]

    def first_lacking(self, client_id: int) -> int:
        """Return the first chunk that a client has not delivered."""
        return next(index for index in range(len(self._cuts)) if index not in self._came[client_id])

    @property
    def updates(self) -> list[Update]:
        """The header of each update that counts, without elements, in client order."""
        return [self._first[client_id] for client_id in self._came if client_id in self._first]

    def progress_of(self, client_id: int) -> str:
        """Describe how much of a client's update is there."""
        chunks = self._came[client_id]
        return f"client {client_id}: {len(chunks)} of {len(self._cuts)} chunks, {sum(chunks.values())} bytes"

    def hash_of(self, *clients: int) -> str:
        """Return a hash of what has come of these clients' updates; empty if nothing is accounted."""
        hashes = self._hashes or {}
        came = [f"{i}:{k}:{hash_}" for i in clients for k, hash_ in sorted(hashes.get(i, {}).items())]
        return sha256("\n".join(came).encode()).hexdigest() if came else ""

    def release_of(self, client_id: int) -> dict[str, Any]:
        """Return the hash of what has come of a client's update, and whether that is all; empty as `hash_of`."""
        running, hash_ = self._running[client_id], self.hash_of(client_id)
        if hash_ and running.num_chunks == len(self._cuts):
            return {"sha256": running.hex, "whole": True}
        return {"sha256": hash_} if hash_ else {}

    def take(self, client_id: int, update: Update) -> Refusal | None:
        """Take a chunk, or return why not.

        Raises:
            StorageError: The chunk does not fit into memory, and the disk has no room for it.
        """
        problem = self._misfit(client_id, update) or self._false_claim(client_id, update)
        if problem is not None:
            return problem
        if update.chunk_index in self._came[client_id]:
            return Refusal("duplicate", f"chunk {update.chunk_index + 1} of round {self.round_index + 1} again")
        squared_norm = self._form.squared_norm(update.delta)
        if not isfinite(squared_norm):
            return Refusal("not_finite", f"values that are not finite for block {self.block_index}")
        self._store.put(client_id, update.chunk_index, update.delta)
        if self._hashes is not None:
            self._hashes[client_id][update.chunk_index] = fingerprint([update.delta])
            self._running[client_id].take(update.chunk_index, update.delta)
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
                f"{self.round_index + 1}, which trains block {self.block_index} in {count}",
            )
        size = self._cuts[index].stop - self._cuts[index].start
        if update.delta.num_elements != size:
            text = f"{update.delta.num_elements} parameters where block {self.block_index} has {size}"
            return Refusal("misfit", text)
        if misfit := self._form.misfit(update.delta):
            return Refusal("misfit", misfit)
        if update.num_local_steps != (steps := self._asked[client_id]):
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
        if update.train_loss is not None and not isfinite(update.train_loss):
            return Refusal("not_finite", f"a training loss of {update.train_loss}")
        return None

    def forget(self, client_id: int) -> None:
        """Drop the chunks of a client that will send others."""
        self._begin_again_without(client_id)
        self._running[client_id] = RunningHash()
        if self._hashes is not None:
            self._hashes[client_id] = {}
        self._came[client_id] = {}
        self._came = dict(sorted(self._came.items()))
        self._squared_norms[client_id] = 0.0

    def take_out(self, client_id: int, problem: Refusal) -> None:
        """Go on without a client: its chunks, sent or still to come, do not count in this round."""
        self.out[client_id] = problem
        self._begin_again_without(client_id)

    def check_one_fits(self) -> None:
        """Raise a CodecError if no client is left because all sent updates that do not fit the round."""
        if not self._came and all(problem.reason == "misfit" for problem in self.out.values()):
            client_id, problem = list(self.out.items())[-1]
            raise CodecError(
                f"every update of round {self.round_index + 1} was refused: client {client_id} sent {problem.text}",
                cause="The clients run another configuration or another model than the server.",
                remedy="Use for all clients the same configuration and the same base model.",
            )

    def ends_run(self, *, of_one_client: bool) -> bool:
        """Whether a lack of updates ends the run: where one client's trouble does, or all have the same."""
        is_everybodys = not self._came and len({problem.reason for problem in self.out.values()}) == 1
        return of_one_client or (len(self.out) > 1 and is_everybodys)

    def training_error(self, client_id: int, problem: str, min_updates: int) -> TrainingError:
        """Return the error of a round that lacks updates because a client cannot train."""
        return TrainingError(
            f"client {client_id} could not train round {self.round_index + 1}: {problem}",
            cause=f"{len(self.expected)} clients are left, federation.min_updates is {min_updates}. "
            "Most often the learning rate is too high; or the client's data or weights are broken.",
            remedy="Lower train.learning_rate, or set train.max_grad_norm: 1.0, or look at that client's data.",
        )

    def outliers(self, block: Tensor) -> dict[int, Refusal]:
        """Return the updates that are far larger than the others; none if the rule bounds updates itself.

        Of two clients nobody can tell which is the usual one. So the longer update has to be absurd beside the
        other, and beside the block itself.
        """
        if self._aggregation.bounds_updates:
            return {}
        norms = {i: factor * sqrt(self._squared_norms[i]) for i, factor in self._step_factors().items()}
        weights = {client_id: self._weight(client_id) for client_id in self._came}
        pulls = {i: weights[i] * norm for i, norm in norms.items()}
        norm, weight, pull = (median_high(each.values()) for each in (norms, weights, pulls))
        if len(norms) == 2 and min(norms.values()) > 0:
            norm = max(min(norms.values()), float(block.float().norm()))
        found = {}
        for i in self._came:
            if weights[i] > MAX_EXAMPLES_RATIO * weight:
                text = f"an update of {weights[i]} examples in a round whose median is {weight}"
                found[i] = Refusal("num_examples", text)
            elif norms[i] > MAX_NORM_RATIO * norm > 0:
                text = f"an update of norm {norms[i]:.3g} in a round whose median is {norm:.3g}"
                found[i] = Refusal("norm", text)
            elif pulls[i] > MAX_EXAMPLES_RATIO * pull > 0:
                text = f"an update of {weights[i]} examples and norm {norms[i]:.3g}, of median pull {pull:.3g}"
                found[i] = Refusal("norm", text)
        return found

    def fold_next(self) -> tuple[slice, Tensor]:
        """Fold the next chunk of all clients; return its place in the block, and Δ̄ there."""
        index, factors, aggregation = self._num_folded, self._step_factors(), self._aggregation
        aggregation.content = aggregation.content or self.hash_of(*self.expected)
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
        """Cut a chunk into the parts that are read at a time."""
        size = cut.stop - cut.start
        step = max(1, int(READ_ELEMENTS / (PIECE * len(self._came) * self._form.density))) * PIECE
        return [slice(first, min(first + step, size)) for first in range(0, size or 1, step)]

    def _read(self, index: int, part: slice, factors: Mapping[int, float], client_id: int) -> tuple[Tensor, int]:
        """Return a part of a chunk of an update, and the update's examples."""
        numbers = self._form.numbers(self._store.read(client_id, index, part), factors[client_id])
        return numbers, self._weight(client_id)

    def _weight(self, client_id: int) -> int:
        """Return the examples by which a client counts."""
        examples = self._first[client_id].num_examples
        return examples if self._max_examples is None else min(examples, self._max_examples)

    def _whole(self, client_id: int, factor: float) -> Iterator[Tensor]:
        """Yield a whole update part by part."""
        for index, cut in enumerate(self._cuts):
            for part in self._parts(cut):
                yield self._form.numbers(self._store.read(client_id, index, part), factor)

    def unmask(self, masked: MaskedTransport) -> dict[int, Refusal]:
        """Get the masks of the updates before they are folded; return the clients that have to be taken out first.

        Raises:
            MaskingError: The sum cannot be unmasked; see `MaskedServer.masks_of`.
        """
        t, clients = self.round_index, tuple(self.expected)
        if unfit := masked.unfit(t, clients):
            return {client_id: Refusal("unmasked", text) for client_id, text in unfit.items()}
        fixed = masked.fixed_set(t, clients)
        if set(fixed) < set(clients):
            refusal = Refusal("late", f"an update of round {t + 1}, whose sum is that of clients {fixed}")
            return dict.fromkeys(sorted(set(clients) - set(fixed)), refusal)
        self._aggregation.masks = masked.masks_of(t, clients, self._cuts[0].stop)
        return {}

    @property
    def absurd(self) -> str:
        """Why the folded updates cannot be what they should; see `RoundAggregation.absurd`."""
        return self._aggregation.absurd

    @property
    def content(self) -> str:
        """A hash of the folded updates, for the account."""
        return self._aggregation.content

    def _step_factors(self) -> dict[int, float]:
        """Return K̄ / K_i of each client, so that more local steps do not weigh more.

        K̄ is the mean of the K_i with the weights of the mean of the updates.

        Source: Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated
        Optimization, 2020 (FedNova).
        """
        examples = {i: self._weight(i) for i in self._came}
        mean = sum(n * self._asked[i] for i, n in examples.items()) / sum(examples.values())
        return {i: mean / self._asked[i] for i in examples}

    def aggregate(self) -> Aggregate:
        """Return the aggregate of all chunks; no client can be taken out after this."""
        self._store.close()
        return self._aggregation.aggregate()

    def close(self) -> None:
        """Drop the updates: the round is committed, or void, or the server ends."""
        self._store.close()

    def noise(self, encoding: Encoding, server_id: int) -> np.random.Generator | None:
        """Return the draws that round this round's new value; they go on from chunk to chunk."""
        if self._noise is None:
            self._noise = encoding.noise(self.round_index, server_id)
        return self._noise

    def _begin_again_without(self, client_id: int) -> None:
        del self._came[client_id]
        self._store.drop(client_id)
        self._first.pop(client_id, None)
        self.began_again = self.began_again or self._num_folded > 0
        self._aggregation, self._num_folded = self._form.aggregation(self.round_index), 0
        self._noise, self._mean = None, None
