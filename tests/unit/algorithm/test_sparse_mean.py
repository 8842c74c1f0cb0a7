"""The mean of sparse updates is that of the same updates with their zeros, however it is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parablock.algorithm.aggregate import PIECE, Kinds, average
from parablock.algorithm.robust import Rule, aggregate_by
from parablock.algorithm.sparse_mean import SparseAggregation, average_sparse

SIZE = 3 * PIECE + 41
KINDS = Kinds((PIECE + 7, 100, 2 * PIECE - 66), 2)


def dense(num_clients: int = 5) -> dict[int, tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(SIZE, generator=generator)
    return {
        i: (
            (common + torch.randn(SIZE, generator=generator)) * (torch.rand(SIZE, generator=generator) < 0.03),
            i + 1,
        )
        for i in range(num_clients)
    }


def sparse(updates: dict[int, tuple[Tensor, int]], part: slice = slice(None)) -> dict[int, tuple[Tensor, int]]:
    return {i: (delta[part].to_sparse().coalesce(), n) for i, (delta, n) in updates.items()}


@pytest.mark.parametrize("kinds", [None, KINDS])
def test_the_mean_and_rho_are_those_of_the_dense_updates(kinds: Kinds | None) -> None:
    updates = dense()
    found, wanted = average_sparse(sparse(updates), kinds), aggregate_by(Rule(), updates, kinds=kinds)
    assert torch.allclose(found.mean_delta, wanted.mean_delta, atol=1e-6)
    assert found.rho == pytest.approx(wanted.rho, rel=1e-5)
    assert found.squared_delta == pytest.approx(wanted.squared_delta, rel=1e-5)
    weighed_alike = average({i: (delta, 1) for i, (delta, _) in updates.items()})
    assert not torch.allclose(found.mean_delta, weighed_alike.mean_delta, atol=1e-3)


@pytest.mark.parametrize("kinds", [None, KINDS])
def test_parts_are_bitwise_the_whole_in_any_order_of_arrival(kinds: Kinds | None) -> None:
    updates = dense()
    whole, cut = average_sparse(sparse(updates), kinds), SparseAggregation(kinds)
    backwards = dict(reversed(updates.items()))
    for part in (slice(0, PIECE), slice(PIECE, 3 * PIECE), slice(3 * PIECE, SIZE)):
        cut.fold(sparse(backwards, part))
    joined = cut.aggregate()
    assert torch.equal(joined.mean_delta, whole.mean_delta)
    assert (joined.rho, joined.squared_delta) == (whole.rho, whole.squared_delta)
