"""The forms of an update: differences in a wire format, fixed-point words, stacked adapters.

A form answers every question about the content of an update, at both ends: how it is cut and encoded, what the
server accepts and folds, and which value a client takes over at the commit. A new kind of update is a class here.

| form | a client sends | the server makes | a client takes over |
|---|---|---|---|
| `Differences` | q(Δ), chunk by chunk | the mean, or the result of a robust rule | the value, or a difference |
| `SparseDifferences` | the largest elements of Δ | their mean | the same, as a difference |
| `FixedPointWords` | whole numbers, masked or not | their exact sum | the value |
| `StackedAdapters` | A and B of every matrix | the stack and its product ΔW | the product of the stack |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from math import isfinite

import torch
from torch import Tensor

from parablock.algorithm.aggregate import SLICE, Aggregate, Kinds
from parablock.algorithm.fixed_point import EXTRA_WORDS, FixedPointAggregation, FixedPointGrid
from parablock.algorithm.parablock import delta_of
from parablock.algorithm.robust import Normals, RoundAggregation, Rule, scale
from parablock.algorithm.sparse_mean import SparseAggregation
from parablock.algorithm.stacking import Factors, StackAggregation
from parablock.errors import CodecError
from parablock.model.device_copy import ArrivingVector
from parablock.privacy.protection import Protection
from parablock.wire.messages import new_block_value
from parablock.wire.quantize import QUANTIZED, Encoding, Vector, join_chunks, pack, sparse_format
from parablock.wire.sparse import CELL, Sparse

WORD = "word32"
NoiseOfRound = Callable[[int, tuple[int, ...], str], Normals]
"""(round_index, clients, hash of their updates) → the noise that the server adds to the mean of these updates."""


@dataclass(frozen=True)
class LocalUpdate:
    """A client's update of one round, before it is encoded.

    Attributes:
        round_index: t.
        client_id: The client.
        trained: y^b, or the trained adapters; flat, fp32, on the CPU or on its way there.
        start: v^b, from which the local steps started.
        residual: The rounding residual of the block's last visit; None without error feedback, or before.
        protection: Clipping and noise; None: none.
    """

    round_index: int
    client_id: int
    trained: ArrivingVector
    start: Tensor
    residual: Tensor | None = None
    protection: Protection | None = None


@dataclass(frozen=True)
class EncodedUpdate:
    """An update as it leaves a client.

    Attributes:
        chunks: The payload of each message.
        seen: The update as the server will decode it: flat, fp32.
        residual: The rounding residual; None without error feedback.
        losses: Shares of the update that are lost before it leaves, each with the text of a warning.
    """

    chunks: list[Vector]
    seen: Tensor
    residual: Tensor | None = None
    losses: tuple[tuple[float, str], ...] = ()


class UpdateForm(ABC):
    """An update's form; the same object serves the server and all clients.

    The methods here are for numbers that travel as they are; a form overrides the others.

    Attributes:
        encoding: The encoding of new values.
        kinds: The kinds of parameters that have a ρ of their own; None: there is one ρ.
        density: The part of the elements that `numbers` holds.
    """

    encoding: Encoding
    kinds: Kinds | None = None
    density: float = 1.0

    def encoded_by(self, encoding: Encoding) -> UpdateForm:
        """Return the form with the configured encoding, where a method's own form leaves that open."""
        del encoding
        return self

    def num_elements(self, num_parameters: int) -> int:
        """Return the number of elements of an update of a block."""
        return num_parameters

    def cuts(self, num_parameters: int) -> list[slice]:
        """Return the cut of a block's update into chunks."""
        return self.encoding.cut(self.num_elements(num_parameters))

    @abstractmethod
    def encode(self, update: LocalUpdate) -> EncodedUpdate:
        """Encode an update, the first chunks while the last are still on their way from the model's device."""

    def decode(self, chunks: Sequence[Vector]) -> Tensor:
        """Return the update that the server sees: flat, fp32."""
        return join_chunks(chunks)

    @property
    def payload_format(self) -> str:
        """The format of every payload of an update."""
        return self.encoding.format

    def misfit(self, vector: Vector) -> str:
        """Return why a payload is of another form; empty if it fits."""
        wanted = self.payload_format
        return "" if vector.format == wanted else f"{vector.format} where updates are {wanted}"

    def squared_norm(self, vector: Vector) -> float:
        """Return ‖Δ‖² of a chunk; not finite if an element is not."""
        squares, step = 0.0, 4 * SLICE * round(1 / self.density)
        for first in range(0, vector.num_elements, step):
            values = vector.part(slice(first, min(first + step, vector.num_elements))).stored.float()
            squares += float(values.dot(values))
        return squares

    def numbers(self, vector: Vector, factor: float) -> Tensor:
        """Return a payload as the aggregation folds it: factor · Δ, fp32."""
        return scale(vector.values.float(), factor)

    @abstractmethod
    def aggregation(self, round_index: int) -> RoundAggregation:
        """Return a new aggregation for a round."""

    def news(self, aggregate: Aggregate) -> tuple[str, Vector] | None:
        """Return the kind and the payload of a commit's news; None if the downlink packs the new value."""
        del aggregate
        return None

    def new_value(self, held: Tensor, block_index: int, kind: str, vectors: Sequence[Vector]) -> Tensor:
        """Return a block after a commit, from the value that a client held and the news.

        Raises:
            CodecError: The news are of another form, or do not fit the block.
        """
        if kind == "stack":
            raise CodecError(
                f"the news of block {block_index} are a stack of adapters, and this client trains none",
                cause="The server runs another method.",
                remedy="Use the same configuration for both.",
            )
        return new_block_value(held, block_index, kind, vectors)


@dataclass(frozen=True)
class Differences(UpdateForm):
    """Δ in the wire's format, in chunks, with error feedback where the encoding asks for it.

    Attributes:
        encoding: The encoding of Δ and of new values.
        rule: The server's aggregation rule.
        noise: The noise of central differential privacy; None: none.
        kinds: As for all forms.
    """

    encoding: Encoding
    rule: Rule = field(default_factory=Rule)
    noise: NoiseOfRound | None = None
    kinds: Kinds | None = None

    def encode(self, update: LocalUpdate) -> EncodedUpdate:
        """Encode Δ as q(Δ), or with error feedback as q(Δ + e), keeping e ← Δ + e − q."""
        delta, losses = _protected(update)
        encoded = _encode_in_chunks(delta, update.start.numel(), self.encoding, update)
        return replace(encoded, losses=(*losses, *encoded.losses))

    def aggregation(self, round_index: int) -> RoundAggregation:
        """Return an aggregation by the rule."""
        return RoundAggregation(self.rule, self.noise and partial(self.noise, round_index), self.kinds)


@dataclass(frozen=True)
class SparseDifferences(Differences):
    """The largest elements of Δ + e, whose mean is made without the zeros between them."""

    @property
    def density(self) -> float:  # type: ignore[override]
        """The part of the elements that travel."""
        return self._format.kept / CELL

    @property
    def _format(self) -> Sparse:
        sparse = sparse_format(self.encoding.format)
        assert sparse is not None
        return sparse

    def misfit(self, vector: Vector) -> str:
        """Refuse other formats, and places that are not those of different elements."""
        if misfit := super().misfit(vector):
            return misfit
        places = vector.places
        if not places.numel() or (bool((places.diff() > 0).all()) and int(places[-1]) < vector.num_elements):
            return ""
        return "places that do not ascend, or lie outside the block"

    def numbers(self, vector: Vector, factor: float) -> Tensor:
        """Return factor · Δ as a sparse tensor."""
        size = (vector.num_elements,)
        coordinates, kept = vector.places.unsqueeze(0), scale(vector.stored, factor)
        return torch.sparse_coo_tensor(coordinates, kept, size, is_coalesced=True, check_invariants=False)

    def aggregation(self, round_index: int) -> RoundAggregation:
        """Return a mean of sparse updates."""
        del round_index
        return SparseAggregation(self.kinds)


@dataclass(frozen=True)
class FixedPointWords(UpdateForm):
    """Whole numbers on a grid, whose sum modulo 2^32 is exact, so that they can be masked.

    Attributes:
        grid: The run's grid.
        rule: The mean, with the bound of an update's norm.
        noise: As for `Differences`.
    """

    grid: FixedPointGrid
    rule: Rule = field(default_factory=Rule)
    noise: NoiseOfRound | None = None
    encoding: Encoding = field(default=Encoding("float32"), init=False)

    def cuts(self, num_parameters: int) -> list[slice]:
        """Return one chunk with the extra word: no part of a masked sum is known before the whole."""
        return [slice(0, num_parameters + EXTRA_WORDS)]

    def encode(self, update: LocalUpdate) -> EncodedUpdate:
        """Round Δ to the grid, and add the client's part of distributed noise."""
        delta, losses = _protected(update)
        numbers = self.grid.encode(delta[:])
        if update.protection is not None:
            update.protection.hide(numbers[:-EXTRA_WORDS], update.round_index)
        words = pack(numbers, WORD)
        return EncodedUpdate([words], self.decode([words]), losses=losses)

    def decode(self, chunks: Sequence[Vector]) -> Tensor:
        """Return the numbers that the words stand for."""
        return self.grid.decode(chunks[0].values)

    @property
    def payload_format(self) -> str:
        """The format of words."""
        return WORD

    def numbers(self, vector: Vector, factor: float) -> Tensor:
        """Return the words as they are; masked ones cannot be shortened."""
        del factor
        return vector.values

    def aggregation(self, round_index: int) -> RoundAggregation:
        """Return a sum of words."""
        noise = self.noise and partial(self.noise, round_index)
        return FixedPointAggregation(self.grid, self.rule, noise, lambda words: sha256(words).hexdigest())


@dataclass(frozen=True)
class StackedAdapters(UpdateForm):
    """A and B of every matrix, which the server stacks, so that their product is the exact mean (FLoRA).

    Attributes:
        factors: The split of flat vectors into A and B.
        adapters: The encoding of adapters and stacks, in one chunk; values of matrices travel as they are.
    """

    factors: Factors
    adapters: Encoding = field(default=Encoding("float32"))
    encoding: Encoding = field(default=Encoding("float32"), init=False)

    def encoded_by(self, encoding: Encoding) -> UpdateForm:
        """Return the form whose adapters and stacks travel so."""
        return replace(self, adapters=encoding)

    def num_elements(self, num_parameters: int) -> int:
        """Return the elements of one client's adapters."""
        del num_parameters
        return self.factors.num_elements

    @property
    def payload_format(self) -> str:
        """The format of adapters."""
        return self.adapters.format

    def squared_norm(self, vector: Vector) -> float:
        """Return that of the product, which is what an update adds; not finite if that of the factors is not."""
        of_factors = super().squared_norm(vector)
        return self.factors.squared_norm(vector.values.float()) if isfinite(of_factors) else of_factors

    def encode(self, update: LocalUpdate) -> EncodedUpdate:
        """Encode the trained adapters themselves."""
        return _encode_in_chunks(update.trained, self.factors.num_elements, self.adapters, update)

    def aggregation(self, round_index: int) -> RoundAggregation:
        """Return a stack to fill."""
        del round_index
        return StackAggregation(self.factors, lambda stack: self._pack(stack).values.float())

    def news(self, aggregate: Aggregate) -> tuple[str, Vector] | None:
        """Return the stack, which every client multiplies itself."""
        return None if aggregate.stack is None else ("stack", self._pack(aggregate.stack))

    def _pack(self, stack: Tensor) -> Vector:
        return pack(stack, self.adapters.format)

    def new_value(self, held: Tensor, block_index: int, kind: str, vectors: Sequence[Vector]) -> Tensor:
        """Add the product of the stack to the matrices."""
        if kind == "stack":
            kind, vectors = "difference", [pack(self.factors.product(join_chunks(vectors)), "float32")]
        return super().new_value(held, block_index, kind, vectors)


@dataclass(frozen=True)
class _Delta:
    """Δ of a block, made part by part."""

    trained: ArrivingVector
    start: Tensor

    def __getitem__(self, part: slice, /) -> Tensor:
        return delta_of(self.trained[part], self.start[part])


def _protected(update: LocalUpdate) -> tuple[ArrivingVector, tuple[tuple[float, str], ...]]:
    """Return Δ after clipping and noise, with the share of its norm that clipping takes."""
    delta = _Delta(update.trained, update.start)
    if update.protection is None:
        return delta, ()
    protected, factor = update.protection.apply(delta[:], update.round_index)
    return protected, ((1 - factor, "clipping removes {:.1%} of the norm"),)


def _encode_in_chunks(vector: ArrivingVector, size: int, encoding: Encoding, update: LocalUpdate) -> EncodedUpdate:
    """Encode a vector chunk by chunk, each as soon as it has arrived."""
    residual, moved, left = update.residual, 0, 0
    noise, chunks = encoding.noise(update.round_index, update.client_id), list[Vector]()
    seen, kept_back = torch.empty(size), torch.empty(size if encoding.error_feedback else 0)
    for part in encoding.cut(size):
        exact = vector[part] if residual is None else vector[part] + residual[part]
        seen[part] = exact
        chunks.append(pack(seen[part], encoding.format, noise))  # float32: a view of what is seen, no copy
        if encoding.format != "float32":
            seen[part] = chunks[-1].values
        if encoding.format in QUANTIZED:
            moved, left = moved + int(exact.count_nonzero()), left + int(seen[part].count_nonzero())
        if encoding.error_feedback:
            torch.sub(exact, seen[part], out=kept_back[part]).mul_(encoding.residual_decay)
    losses = ((1 - left / moved, "rounding sets {:.1%} of the elements to zero"),) if moved else ()
    return EncodedUpdate(chunks, seen, kept_back if encoding.error_feedback else None, losses)
