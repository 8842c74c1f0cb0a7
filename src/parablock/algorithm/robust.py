r"""Robust aggregation: median, trimmed mean, Krum, norm clipping, and the noise of differential privacy.

| rule | the aggregate Δ̄ of M updates | a hostile minority can |
|---|---|---|
| mean | Σ w_i Δ_i | move it anywhere; with `clip_norm`, by at most its weight times the bound |
| median | element by element, the median; every client counts once | not leave the range of the others |
| trimmed_mean | element by element, the mean without the ⌊β M⌋ smallest and largest | the same, below β |
| krum | the one update whose M − f − 2 nearest neighbours are nearest | replace it by another honest one |

With noise (central differential privacy) every client has the weight 1/M in the mean, and Gaussian noise of
standard deviation z·C/M is added to every element. Distributed noise is in the sum already (`fixed_point.py`).

A rule has two stages. The first looks at whole updates (norms, distances): clipping gives each update a factor, and
`krum` chooses one. The second folds elements part by part, as the plain mean does. So a rule without a first stage
can begin before a whole update has come. Either way the result is bitwise that of the whole block.

ρ is the squared length of Δ̄ over that of an update: over the weighted mean for `mean`, and over the clients'
median for the other rules, so that no client can switch the overlay off with a huge update. With noise, ρ may
depend on the noisy mean alone: from its squared length that of the noise is subtracted in expectation, and the
difference is divided by C². It is at least 1/M, as for clients that have nothing in common.

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

from parablock.algorithm.aggregate import PIECE, SLICE, Aggregate, Folded, Kinds, agreement, fold, join

Parts = Iterable[Tensor]
"""A client's whole update in consecutive parts, which all clients cut alike, at multiples of `PIECE` elements. The
parts may be iterated more than once, and need not be in memory at once."""

Normals = Callable[[int], Tensor]
"""n → the next n standard normal numbers, fp32."""

NoiseOfUpdates = Callable[[tuple[int, ...], str], Normals]
"""(clients, hash of their updates) → the noise on their mean."""


@dataclass(frozen=True)
class Rule:
    """The aggregation rule of a run.

    Attributes:
        name: mean | median | trimmed_mean | krum.
        trim_fraction: β: the part of the clients that is cut at either end.
        assumed_attackers: f, for krum.
        clip_norm: C: longer updates are first shortened to this length; None: no clipping.
        noise_multiplier: z, with the mean of clipped updates; 0: no noise.
    """

    name: str = "mean"
    trim_fraction: float = 0.2
    assumed_attackers: int = 1
    clip_norm: float | None = None
    noise_multiplier: float = 0.0

    @property
    def needs_whole(self) -> bool:
        """Whether folding has to wait until every update is complete."""
        return self.name == "krum" or self.clip_norm is not None


class RoundAggregation:
    """The aggregation of one round's updates, part by part.

    Args:
        rule: The aggregation rule.
        normals: (participating clients, `content`) → their noise; needed if the rule adds noise.
        kinds: The kinds of the group's parameters, for a ρ of each; None: one ρ, as always with noise.

    Attributes:
        folds_parts: Whether elements are independent, so that a part can be folded by itself.
        masks: The sum of the masks that hide the updates, 1-D, int32; None if they carry none.
        content: A hash of the updates, so that the same noise never covers two means.
        absurd: Why the updates cannot be what their clients should have sent; empty: nothing is known.
    """

    folds_parts = True
    masks: Tensor | None = None
    content = ""
    absurd = ""
    _deviation = 0.0
    """The standard deviation of noise in the mean."""

    def __init__(
        self,
        rule: Rule = Rule(),
        normals: NoiseOfUpdates | None = None,
        kinds: Kinds | None = None,
    ) -> None:
        self._rule, self._normals, self._kinds = rule, normals, kinds if normals is None else None
        self._of_kind: list[list[list[float]]] = [[] for _ in range(kinds.count)] if kinds else []
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
        """Whether the rule itself limits the effect of a long update."""
        return self._rule.noise_multiplier > 0

    def look_at(self, updates: Mapping[int, Parts]) -> None:
        """Run the first stage on whole updates: compute the clip factors, and let krum choose."""
        if self._rule.clip_norm is not None:
            self._factors = {i: clip_factor(parts, self._rule.clip_norm) for i, parts in updates.items()}
        if self._rule.name == "krum":
            shortened = {i: _shorten(parts, self._factor(i)) for i, parts in updates.items()}
            self._chosen = krum(shortened, self._rule.assumed_attackers)

    def fold_into(self, mean: Tensor) -> None:
        """Set the memory for Δ̄ (flat, fp32), so that its parts need not be joined; the aggregate owns it."""
        self._mean = mean

    def fold(self, updates: Mapping[int, tuple[Tensor, int]]) -> Tensor:
        """Fold the next part of every update, as `aggregate.fold` does; return this part of Δ̄, flat, fp32."""
        folded = self._fold_part(updates)
        if self._mean is not None:
            place = self._mean[self._num_folded : self._num_folded + folded.mean.numel()]
            folded = replace(folded, mean=place.copy_(folded.mean))
        self._num_folded += folded.mean.numel()
        self._parts.append(folded)
        return folded.mean

    def aggregate(self) -> Aggregate:
        """Return the aggregate of all parts."""
        joined = join(self._parts, self._mean)
        if self._deviation > 0:
            return self._subtract_expected_noise(joined)
        if self._kinds is not None:
            return replace(joined, rho=tuple(map(self._rho_of, self._of_kind)))
        if self._rule.name == "mean":
            return joined
        typical = median(fsum(squares) for squares in zip(*self._squares, strict=True))
        squared = fsum(square for part in self._parts for square in part.squared_mean)
        return replace(joined, rho=agreement(squared, typical))

    def _rho_of(self, cells: Sequence[Sequence[float]]) -> float:
        """Return ρ of one kind of parameters, from the squares of the mean and of each update in its cells."""
        squared, *norms = (fsum(squares) for squares in zip(*cells, strict=True))
        if self._rule.name == "mean":
            return agreement(squared, sum(w * norm for w, norm in zip(self._weights, norms, strict=True)))
        return agreement(squared, median(norms))

    def _fold_part(self, updates: Mapping[int, tuple[Tensor, int]]) -> Folded:
        updates = {i: (scale(delta, self._factor(i)), n) for i, (delta, n) in sorted(updates.items())}
        folded = self._fold_shortened(updates)
        if self._kinds is not None:
            total = sum(n for _, n in updates.values())
            self._weights = [n / total for _, n in updates.values()]
            vectors = [folded.mean, *(delta for delta, _ in updates.values())]
            for cell, kind in self._kinds.cells(self._num_folded, self._num_folded + folded.mean.numel()):
                self._of_kind[kind].append([squared_norm([vector[cell]]) for vector in vectors])
        return folded

    def _fold_shortened(self, updates: Mapping[int, tuple[Tensor, int]]) -> Folded:
        if self._normals is not None:
            mean = fold({i: (delta, 1) for i, (delta, _) in updates.items()}).mean
            mean = self._add_noise(mean, tuple(updates))
            return Folded(mean, tuple(_squares(mean)), ())
        if self._rule.name == "mean":
            return fold(updates)
        if self._chosen is not None:
            mean = updates[self._chosen][0]
        else:
            deltas = [delta for delta, _ in updates.values()]
            mean = sorted_mean(deltas, _num_cut(self._rule, len(deltas)))
        self._squares += zip(*(_squares(delta) for delta, _ in updates.values()), strict=True)
        return Folded(mean, tuple(_squares(mean)), ())

    def _add_noise(self, mean: Tensor, clients: tuple[int, ...]) -> Tensor:
        assert self._normals is not None and self._rule.clip_norm is not None
        self._draw = self._draw or self._normals(clients, self.content)
        self._num_clients = len(clients)
        self._deviation = self._rule.noise_multiplier * self._rule.clip_norm / len(clients)
        return mean.add_(self._deviation * self._draw(mean.numel()))

    def _subtract_expected_noise(self, joined: Aggregate) -> Aggregate:
        assert self._rule.clip_norm is not None
        size = joined.mean_delta.numel()
        squared = joined.squared_delta * size - size * self._deviation**2
        return replace(joined, rho=min(1.0, max(1 / self._num_clients, squared / self._rule.clip_norm**2)))

    def _factor(self, client_id: int) -> float:
        return self._factors.get(client_id, 1.0)


def aggregate_by(
    rule: Rule,
    updates: Mapping[int, tuple[Tensor, int]],
    normals: NoiseOfUpdates | None = None,
    kinds: Kinds | None = None,
) -> Aggregate:
    """Aggregate one round's whole updates; see `RoundAggregation`."""
    round_ = RoundAggregation(rule, normals, kinds)
    round_.look_at({client_id: [delta] for client_id, (delta, _) in updates.items()})
    round_.fold(updates)
    return round_.aggregate()


def squared_norm(parts: Parts) -> float:
    """Return ‖Δ‖²: the exact sum over pieces, however the update was cut."""
    return fsum(square for part in parts for square in _squares(part))


def clip_factor(parts: Parts, clip_norm: float) -> float:
    """Return the factor, at most 1, that shortens an update to `clip_norm`."""
    norm = sqrt(squared_norm(parts))
    return clip_norm / norm if norm > clip_norm else 1.0


def scale(delta: Tensor, factor: float) -> Tensor:
    """Return factor · Δ; the update itself for 1."""
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
    """Return the client_id whose update has the smallest sum of squared distances from its nearest neighbours.

    Each of the M updates is compared with its M − f − 2 nearest neighbours, at least one; f attackers are assumed.
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
    """Return how many elements to cut at either end; the median keeps the middle one or two."""
    if rule.name == "median":
        return (num_updates - 1) // 2
    return min(int(rule.trim_fraction * num_updates), (num_updates - 1) // 2)


def _shorten(parts: Parts, factor: float) -> Iterator[Tensor]:
    return (scale(part, factor) for part in parts)


def _squares(vector: Tensor) -> list[float]:
    return [float(piece.square().sum(dtype=torch.float64)) for piece in torch.split(vector, PIECE)]
