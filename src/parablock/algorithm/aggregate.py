"""Aggregation of a block's updates: the weighted mean, its alignment ρ, and the server optimizer's step.

A block may be folded part by part, as its updates come in; the result is bitwise that of the whole block. Updates
are always folded in ascending client_id and with weights that sum to one. So the order of arrival has no effect,
and the mean of a single update is bitwise that update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import fsum

import torch
from torch import Tensor

PIECE = 1 << 14
"""Elements whose squares are summed at a time; a norm is the exact sum over pieces, however the block is cut."""

SLICE = 1 << 16
"""Elements folded at a time; small enough for the cache, and a multiple of `PIECE`."""

ADAM_BETA2 = 0.99
ADAM_EPSILON = 1e-3
"""Decay of the second moment and the adaptivity of the server's Adam (FedAdam: Reddi et al. 2021, §5)."""


Rho = float | tuple[float, ...]
"""ρ of a group of parameters: one number, or one for each of its `Kinds`."""


@dataclass(frozen=True)
class Kinds:
    """The kinds of parameters in a group, such as A and B of adapters, which agree differently among clients.

    The group is cut into runs of these `lengths`, whose kinds 0 … `count` − 1 take turns.
    """

    lengths: tuple[int, ...]
    count: int

    def spread(self, values: Sequence[float]) -> Tensor:
        """Return for each element the value of its kind: flat, fp32."""
        of_runs = torch.tensor([values[run % self.count] for run in range(len(self.lengths))])
        return of_runs.repeat_interleave(torch.tensor(self.lengths))

    def cells(self, first: int, end: int) -> Iterator[tuple[slice, int]]:
        """Cut the elements from `first` to `end` at pieces and at runs; yield each cell, from 0, and its kind.

        Cells depend on the group alone if every cut is at a multiple of `PIECE`.
        """
        bounds = [0, *accumulate(self.lengths)]
        for run, (begin, stop) in enumerate(pairwise(bounds)):
            begin, stop = max(begin, first), min(stop, end)
            while begin < stop:
                cut = min(stop, (begin // PIECE + 1) * PIECE)
                yield slice(begin - first, cut - first), run % self.count
                begin = cut


def each_rho(rho: Rho) -> tuple[float, ...]:
    """Return ρ of each kind; one number stands for all."""
    return rho if isinstance(rho, tuple) else (rho,)


@dataclass(frozen=True)
class Aggregate:
    """The aggregate of one round's updates.

    Attributes:
        mean_delta: Δ̄ = Σ w_i Δ_i / Σ w_i, flat, fp32.
        rho: ‖Δ̄‖² / Σ w_i‖Δ_i‖² in [0, 1], with the w_i divided by their sum: 1 if the clients agree, 0 if their
            updates cancel, and 1 by definition if no client moved. One for each of the group's `Kinds`, if it has.
        squared_delta: Mean squared element of Δ̄.
        stack: The stacked factors whose product is Δ̄; None if Δ̄ itself travels.
    """

    mean_delta: Tensor
    rho: Rho
    squared_delta: float
    stack: Tensor | None = None


@dataclass(frozen=True)
class ServerOptimizer:
    """The server optimizer: `none` adds Δ̄ to the block; `momentum` and `adam` keep moments for each block.

    The learning rate is η of momentum and adam, and `momentum` the decay of the first moment.
    """

    name: str = "none"
    learning_rate: float = 1.0
    momentum: float = 0.9


@dataclass(frozen=True)
class Folded:
    """Consecutive whole pieces of a block, folded over the clients.

    `mean` is this part of Δ̄ (flat, fp32); the squares are ‖Δ̄‖² and Σ w_i‖Δ_i‖² of each piece.
    """

    mean: Tensor
    squared_mean: tuple[float, ...]
    squared_norms: tuple[float, ...]


def fold(updates: Mapping[int, tuple[Tensor, int]]) -> Folded:
    """Fold the same part of each client's update; a part begins at a multiple of `PIECE` elements.

    `updates` has for each client_id this part of its Δ (flat, fp32) and its number of training examples.

    Raises:
        ValueError: There is no update, or the updates have no examples.
    """
    total = sum(num_examples for _, num_examples in updates.values())
    if total <= 0:
        raise ValueError(f"{len(updates)} updates with {total} examples have no mean")
    deltas = [(updates[i][0], updates[i][1] / total) for i in sorted(updates)]
    mean = torch.empty_like(deltas[0][0])
    buffer = torch.empty(min(SLICE, mean.numel()), dtype=mean.dtype)
    squared_mean: list[float] = []
    squared_norms: list[float] = []
    for part in _slices(mean.numel()):
        folded, squares = mean[part], buffer[: part.stop - part.start]
        for position, (delta, weight) in enumerate(deltas):
            own = delta[part]
            if position == 0:
                torch.mul(own, weight, out=folded)
                torch.mul(own, folded, out=squares)
            else:
                folded.add_(own, alpha=weight)
                squares.addcmul_(own, own, value=weight)
        squared_norms += _sums(squares)
        squared_mean += _sums(torch.mul(folded, folded, out=squares))
    return Folded(mean, tuple(squared_mean), tuple(squared_norms))


def join(parts: Sequence[Folded], mean: Tensor | None = None) -> Aggregate:
    """Join all parts of a block, in order, into one aggregate; the cuts have no effect.

    `mean` is the tensor of the whole Δ̄ if the means of the parts already are views of it.
    """
    if mean is None:
        mean = parts[0].mean if len(parts) == 1 else torch.cat([part.mean for part in parts])
    squared_mean = fsum(square for part in parts for square in part.squared_mean)
    squared_norms = fsum(square for part in parts for square in part.squared_norms)
    return Aggregate(mean, agreement(squared_mean, squared_norms), squared_mean / max(1, mean.numel()))


def agreement(squared_mean: float, squared_norm: float) -> float:
    """Return ρ, from the squared length of the mean and that of an update."""
    return min(1.0, squared_mean / squared_norm) if squared_norm > 0 else 1.0


def average(updates: Mapping[int, tuple[Tensor, int]]) -> Aggregate:
    """Fold one round's whole updates into their weighted mean; see `fold`."""
    return join([fold(updates)])


def apply_update(
    value: Tensor,
    mean_delta: Tensor,
    moments: tuple[Tensor, ...],
    optimizer: ServerOptimizer,
    into: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Move one block by its mean delta.

    Args:
        value: x^b, flat, in the run's dtype.
        mean_delta: Δ̄, flat, fp32.
        moments: The optimizer's state for this block; empty at its first visit.
        optimizer: The server optimizer.
        into: Memory for the sum, which may be that of Δ̄ if Δ̄ is no longer needed; None: new memory.

    Returns:
        The new x^b in the same dtype (summed in fp32, rounded once), and the new moments.

    Source: Reddi et al., Adaptive Federated Optimization, 2021 (without bias correction, as there).
    """
    if optimizer.name == "none":
        return torch.add(value.float(), mean_delta, out=into).to(value.dtype), ()
    beta = optimizer.momentum
    if optimizer.name == "momentum":
        velocity = mean_delta if not moments else beta * moments[0] + mean_delta
        return (value.float() + optimizer.learning_rate * velocity).to(value.dtype), (velocity,)
    if optimizer.name != "adam":
        raise ValueError(f"server optimizer {optimizer.name!r} is none of none, momentum, adam")
    first, second = moments or (torch.zeros_like(mean_delta), torch.zeros_like(mean_delta))
    first = beta * first + (1 - beta) * mean_delta
    second = ADAM_BETA2 * second + (1 - ADAM_BETA2) * mean_delta.square()
    step = first / (second.sqrt() + ADAM_EPSILON)
    return (value.float() + optimizer.learning_rate * step).to(value.dtype), (first, second)


def _slices(length: int) -> list[slice]:
    """Cut a part into slices of whole pieces and a rest, so that no sum depends on where the part begins."""
    whole = length - length % PIECE
    ends = [*range(SLICE, whole, SLICE), *([whole] if whole else []), *([length] if length > whole else [])]
    return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def _sums(squares: Tensor) -> list[float]:
    return [float(piece.sum(dtype=torch.float64)) for piece in torch.split(squares, PIECE)]
