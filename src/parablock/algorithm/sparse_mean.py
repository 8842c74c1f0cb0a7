"""The weighted mean of sparse updates, which never become dense: time and memory fall with their density."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from parablock.algorithm.aggregate import PIECE, Aggregate, Folded, Kinds
from parablock.algorithm.robust import RoundAggregation, squared_norm

SparseUpdates = Mapping[int, tuple[Tensor, int]]
"""client_id → (Δ as a 1-D sparse COO tensor, coalesced, fp32; number of training examples)."""


class SparseAggregation(RoundAggregation):
    """The mean of one round's sparse updates, part by part."""

    def __init__(self, kinds: Kinds | None = None) -> None:
        super().__init__(kinds=kinds)

    def _fold_part(self, updates: SparseUpdates) -> Folded:
        """Add up the elements that each client has sent, in ascending client_id."""
        items = sorted(updates.items())
        total = sum(num_examples for _, (_, num_examples) in items)
        size = items[0][1][0].shape[0]
        mean, norms = torch.zeros(size), torch.zeros(ceil(size / PIECE), dtype=torch.float64)
        of_elements = None if self._kinds is None else torch.zeros(size, dtype=torch.float64)
        for _, (delta, num_examples) in items:
            (places,), values, weight = delta.indices(), delta.values(), num_examples / total
            mean.index_add_(0, places, values, alpha=weight)
            squares = values.double().square()
            norms.index_add_(0, places // PIECE, squares, alpha=weight)
            if of_elements is not None:
                of_elements.index_add_(0, places, squares, alpha=weight)
        if self._kinds is not None and of_elements is not None:
            self._weights = [1.0]
            for cell, kind in self._kinds.cells(self._num_folded, self._num_folded + size):
                self._of_kind[kind].append([squared_norm([mean[cell]]), float(of_elements[cell].sum())])
        squared_mean = (squared_norm([piece]) for piece in torch.split(mean, PIECE))
        return Folded(mean, tuple(squared_mean), tuple(norms.tolist()))


def average_sparse(updates: SparseUpdates, kinds: Kinds | None = None) -> Aggregate:
    """Fold one round's whole sparse updates into their weighted mean."""
    round_ = SparseAggregation(kinds)
    round_.fold(updates)
    return round_.aggregate()
