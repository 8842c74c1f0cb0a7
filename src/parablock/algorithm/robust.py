r"""Aggregation rules: what the server makes of a block's updates when some of them may be hostile.

| rule | the aggregate Δ̄ of M updates | a hostile minority can |
|---|---|---|
| mean | Σ w_i Δ_i | move it anywhere; with `clip_norm`, by at most its weight times the bound |
| median | element by element, the median; every client counts once | not leave the range of the others |
| trimmed_mean | element by element, the mean without the ⌊β M⌋ smallest and largest | the same, below β |
| krum | the one update whose M − f − 2 nearest neighbours are nearest | replace it by another honest one |

With noise (central differential privacy) every client counts once in the mean, so that each is at most 1/M of it,
and Gaussian noise of deviation z·C/M is added to every element.

A rule has two stages. What concerns an update as a whole (its norm, its distance from others) gives each a
factor; 0 leaves it out. What concerns elements is folded part by part, as for the plain mean. So all rules but
`krum`, and `clip_norm`, can begin before a whole update has come; either way the result is bitwise that of
the whole block.

ρ is the squared length of Δ̄ over that of an update: over the weighted mean for `mean`, as ever, and over the
median of the clients for the others, so that nobody switches the overlay off by sending something huge. With
noise it may be made of nothing but the noisy mean: its squared length less what noise adds on average, over C².

Source: median and trimmed mean: Yin et al., Byzantine-Robust Distributed Learning, 2018. Krum: Blanchard et al.,
Machine Learning with Adversaries, 2017. Norm clipping: Sun et al., Can You Really Backdoor FL?, 2019.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import fsum, sqrt
from statistics import median

import torch
from torch import Tensor

from parablock.algorithm.aggregate import PIECE, SLICE, Aggregate, Folded, fold, join

Parts = Iterable[Tensor]
"""A client's whole update: consecutive parts, each beginning at a multiple of `PIECE` elements and of a length that
is the same for all clients. It may be gone through more than once, and need not be in memory at once."""

Normals = Callable[[int], Tensor]
"""Gives the next so many standard normal numbers, fp32."""


@dataclass(frozen=True)
class Rule:
    """How a round's updates become one.

    Attributes:
        name: mean | median | trimmed_mean | krum.
        trim_fraction: β: the part of the clients that is cut at either end.
        assumed_attackers: f, for krum.
        clip_norm: C: longer updates are shortened to this length before anything else; None: none is.
        noise_multiplier: z, with the mean of clipped updates; 0: no noise.
    """

    name: str = "mean"
    trim_fraction: float = 0.2
    assumed_attackers: int = 1
    clip_norm: float | None = None
    noise_multiplier: float = 0.0

    @property
    def needs_whole(self) -> bool:
        """Whether nothing can be folded before every update is there to its end."""
        return self.name == "krum" or self.clip_norm is not None


class RoundAggregation:
    """One round's updates on their way into an aggregate.

    Args:
        rule: What to do.
        normals: Gives the noise of the clients that take part; needed where the rule adds some.

    Attributes:
        folds_parts: Whether a chunk may be folded part by part, as the updates' elements have nothing to do with
            each other.
        masks: The sum of the masks that hide the updates, 1-D, int32; None if they carry none.
    """

    folds_parts = True
    masks: Tensor | None = None

    def __init__(self, rule: Rule = Rule(), normals: Callable[[tuple[int, ...]], Normals] | None = None) -> None:
        self._rule, self._normals = rule, normals
        self._draw: Normals | None = None
        self._factors: dict[int, float] = {}
        self._chosen: int | None = None
        self._parts: list[Folded] = []
        self._mean: Tensor | None = None
        self._num_folded = 0
        self._squares: list[tuple[float, ...]] = []

    @property
    def needs_whole(self) -> bool:
        """Whether `look_at` has to be called before the first `fold`."""
        return self._rule.needs_whole

    @property
    def bounds_updates(self) -> bool:
        """Whether no update, however long, can do more than its share."""
        return self._rule.noise_multiplier > 0

    def look_at(self, updates: Mapping[int, Parts]) -> None:
        """Take what depends on whole updates: how far each is shortened, and which one krum chooses."""
        if self._rule.clip_norm is not None:
            self._factors = {i: clip_factor(parts, self._rule.clip_norm) for i, parts in updates.items()}
        if self._rule.name == "krum":
            shortened = {i: _shortened(parts, self._factor(i)) for i, parts in updates.items()}
            self._chosen = krum(shortened, self._rule.assumed_attackers)

    def fold_into(self, mean: Tensor) -> None:
        """Say where Δ̄ of all parts goes, one after the other; they then need not be joined at the end.

        Args:
            mean: As long as all parts together, flat, fp32; it belongs to the aggregate from then on.
        """
        self._mean, self._num_folded = mean, 0

    def fold(self, updates: Mapping[int, tuple[Tensor, int]]) -> Tensor:
        """Fold the next part of every update.

        Args:
            updates: For each client_id that part of its Δ (flat, fp32) and its number of training examples.

        Returns:
            Δ̄ there, flat, fp32.
        """
        folded = self._folded(updates)
        if self._mean is not None:
            place = self._mean[self._num_folded : self._num_folded + folded.mean.numel()]
            folded = replace(folded, mean=place.copy_(folded.mean))
            self._num_folded += place.numel()
        self._parts.append(folded)
        return folded.mean

    def aggregate(self) -> Aggregate:
        """Give the aggregate of all parts."""
        joined = join(self._parts, self._mean)
        if self._normals is not None:
            return self._without_expected_noise(joined)
        if self._rule.name == "mean":
            return joined
        typical = median(fsum(squares) for squares in zip(*self._squares, strict=True))
        squared = fsum(square for part in self._parts for square in part.squared_mean)
        return replace(joined, rho=min(1.0, squared / typical) if typical > 0 else 1.0)

    def _folded(self, updates: Mapping[int, tuple[Tensor, int]]) -> Folded:
        """Fold a part."""
        updates = {i: (scaled(delta, self._factor(i)), n) for i, (delta, n) in sorted(updates.items())}
        if self._normals is not None:
            return self._fold_with_noise(updates)
        if self._rule.name == "mean":
            return fold(updates)
        if self._chosen is not None:
            mean = updates[self._chosen][0]
        else:
            deltas = [delta for delta, _ in updates.values()]
            mean = sorted_mean(deltas, _num_cut(self._rule, len(deltas)))
        self._squares += zip(*(_squares(delta) for delta, _ in updates.values()), strict=True)
        return Folded(mean, tuple(_squares(mean)), ())

    def _fold_with_noise(self, updates: Mapping[int, tuple[Tensor, int]]) -> Folded:
        mean = self._noisy(fold({i: (delta, 1) for i, (delta, _) in updates.items()}).mean, tuple(updates))
        return Folded(mean, tuple(_squares(mean)), ())

    def _noisy(self, mean: Tensor, clients: tuple[int, ...]) -> Tensor:
        assert self._normals is not None and self._rule.clip_norm is not None
        self._draw = self._draw or self._normals(clients)
        self._deviation = self._rule.noise_multiplier * self._rule.clip_norm / len(clients)
        return mean.add_(self._deviation * self._draw(mean.numel()))

    def _without_expected_noise(self, joined: Aggregate) -> Aggregate:
        assert self._rule.clip_norm is not None
        size = joined.mean_delta.numel()
        squared = joined.squared_delta * size - size * self._deviation**2
        return replace(joined, rho=min(1.0, max(0.0, squared / self._rule.clip_norm**2)))

    def _factor(self, client_id: int) -> float:
        return self._factors.get(client_id, 1.0)


def aggregate_by(
    rule: Rule,
    updates: Mapping[int, tuple[Tensor, int]],
    normals: Callable[[tuple[int, ...]], Normals] | None = None,
) -> Aggregate:
    """Aggregate one round's whole updates; see `RoundAggregation`."""
    round_ = RoundAggregation(rule, normals)
    round_.look_at({client_id: [delta] for client_id, (delta, _) in updates.items()})
    round_.fold(updates)
    return round_.aggregate()


def squared_norm(parts: Parts) -> float:
    """Give ‖Δ‖²: the exact sum over pieces, however the update was cut."""
    return fsum(square for part in parts for square in _squares(part))


def clip_factor(parts: Parts, clip_norm: float) -> float:
    """Give what an update has to be multiplied by so that it is no longer than `clip_norm`; at most 1."""
    norm = sqrt(squared_norm(parts))
    return clip_norm / norm if norm > clip_norm else 1.0


def scaled(delta: Tensor, factor: float) -> Tensor:
    """Give factor · Δ; the update itself for 1."""
    return delta if factor == 1.0 else delta * factor


def sorted_mean(deltas: Sequence[Tensor], num_cut: int) -> Tensor:
    """Average element by element without the `num_cut` smallest and largest; summed in ascending order."""
    mean = torch.empty_like(deltas[0])
    kept = len(deltas) - 2 * num_cut
    for first in range(0, mean.numel(), SLICE):
        part = slice(first, first + SLICE)
        rows = torch.stack([delta[part] for delta in deltas]).sort(dim=0).values[num_cut : num_cut + kept]
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        torch.div(total, kept, out=mean[part])
    return mean


def krum(updates: Mapping[int, Parts], assumed_attackers: int) -> int:
    """Choose the update with the smallest sum of squared distances from its nearest neighbours.

    Args:
        updates: For each client_id its whole update.
        assumed_attackers: f; each update is compared with its M − f − 2 nearest neighbours, at least one.

    Returns:
        The client_id; the smallest where several are alike.
    """
    clients = sorted(updates)
    squares = {pair: array("d") for pair in combinations(clients, 2)}
    for parts in zip(*(updates[client_id] for client_id in clients), strict=True):
        part_of = dict(zip(clients, parts, strict=True))
        for one, other in squares:
            squares[one, other].extend(_squares(part_of[other] - part_of[one]))
    distances: dict[int, list[float]] = {client_id: [] for client_id in clients}
    for (one, other), summands in squares.items():
        distance = fsum(summands)
        distances[one].append(distance)
        distances[other].append(distance)
    num_neighbours = max(1, len(clients) - assumed_attackers - 2)
    return min(clients, key=lambda i: (fsum(sorted(distances[i])[:num_neighbours]), i))


def _num_cut(rule: Rule, num_updates: int) -> int:
    """How many are cut at either end; the median keeps the middle one, or the two in the middle."""
    if rule.name == "median":
        return (num_updates - 1) // 2
    return min(int(rule.trim_fraction * num_updates), (num_updates - 1) // 2)


def _shortened(parts: Parts, factor: float) -> Iterator[Tensor]:
    return (scaled(part, factor) for part in parts)


def _squares(vector: Tensor) -> list[float]:
    return [float(piece.square().sum(dtype=torch.float64)) for piece in torch.split(vector, PIECE)]
