"""FLoRA: LoRA with exact aggregation, by stacking the clients' adapters instead of averaging them.

    ΔW = Σ w_k (α / r) B_k A_k = (α / r) [B_1 … B_M] [w_1 A_1; …; w_M A_M]

Source: Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations,
2024 (arXiv 2409.05976).

| symbol | here |
|---|---|
| A_k, B_k | `Factors.split(…)` of client k's update, one pair for each matrix |
| w_k | client k's share of all examples |
| ⊕, stacking | `Factors.stack(…)`: A by rows, times w_k; B by columns |
| ΔW | `Factors.product(…)`: added to the matrices by the server and every client, bitwise alike |

Every client draws new adapters in each round, since the matrices already contain those of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from parablock.algorithm.aggregate import Aggregate
from parablock.algorithm.robust import RoundAggregation
from parablock.errors import CodecError

Pairs = list[tuple[Tensor, Tensor]]
PIECE = 1 << 18
"""Elements of a product that are made at a time: few enough for a cache."""


@dataclass(frozen=True)
class Factors:
    """The layout of A and B in a flat vector: for each matrix A by rows, then B by rows.

    Attributes:
        shapes: (outputs, inputs) of each matrix.
        transposed: For each matrix, whether the model stores it as inputs × outputs, as GPT-2 does.
        rank: r of one client.
        scale: α / r.
    """

    shapes: tuple[tuple[int, int], ...]
    transposed: tuple[bool, ...]
    rank: int
    scale: float

    @property
    def num_elements(self) -> int:
        """Number of elements of one client's adapters."""
        return self.rank * sum(outputs + inputs for outputs, inputs in self.shapes)

    def split(self, flat: Tensor) -> Pairs:
        """Return A (rank × inputs) and B (outputs × rank) of each matrix, of one client or stacked.

        Raises:
            CodecError: The length of `flat` fits no whole number of clients.
        """
        clients, rest = divmod(flat.numel(), self.num_elements)
        if rest or not clients:
            raise CodecError(
                f"a stack of {flat.numel()} elements, where the adapters of a client have {self.num_elements}",
                cause="Client and server do not train the same adapters.",
                remedy="Give both the same model and the same section lora.",
            )
        rank = clients * self.rank
        pieces = iter(torch.split(flat, [rank * size for shape in self.shapes for size in reversed(shape)]))
        return [
            (next(pieces).view(rank, inputs), next(pieces).view(outputs, rank)) for outputs, inputs in self.shapes
        ]

    def product(self, flat: Tensor) -> Tensor:
        """Return (α / r) B A of all matrices, one after the other, laid out as in the model: flat, fp32.

        Its bits are the same on every processor: rank by rank, each product and each sum is rounded by itself,
        whereas a matrix product adds in an order, and with a precision, of the machine's own.
        """
        products = [self.scale * _outer_sum(b.float(), a.float()) for a, b in self.split(flat)]
        laid = [p.T if turned else p for p, turned in zip(products, self.transposed, strict=True)]
        return torch.cat([matrix.reshape(-1) for matrix in laid])

    def stack(self, updates: Mapping[int, tuple[Tensor, int]]) -> Tensor:
        """Stack the adapters of all clients, in ascending client_id, so that their product is ΔW."""
        total = sum(num_examples for _, num_examples in updates.values())
        clients = [(self.split(updates[i][0]), updates[i][1] / total) for i in sorted(updates)]
        pieces = []
        for matrix in range(len(self.shapes)):
            pieces.append(torch.cat([weight * pairs[matrix][0] for pairs, weight in clients]).reshape(-1))
            pieces.append(torch.cat([pairs[matrix][1] for pairs, _ in clients], dim=1).reshape(-1))
        return torch.cat(pieces)

    def squared_norm(self, flat: Tensor) -> float:
        """Return the squared norm of `product`, computed from r × r matrices."""
        squares = ((b.double().T @ b.double()) * (a.double() @ a.double().T) for a, b in self.split(flat))
        found = self.scale**2 * fsum(float(square.sum()) for square in squares)
        return max(found, 0.0)  # where a product is zero, rounding may leave less; NaN stays


def _outer_sum(b: Tensor, a: Tensor) -> Tensor:
    """Return B A, as a sum of outer products in the order of the ranks."""
    found = torch.zeros(b.shape[0], a.shape[1])
    step = max(1, PIECE // a.shape[1])
    for rows, part in zip(torch.split(b, step), torch.split(found, step), strict=True):
        for column, row in zip(rows.T, a, strict=True):
            part += torch.outer(column, row)
    return found


class StackAggregation(RoundAggregation):
    """The aggregation of one round's adapters: the aggregate has the stack beside ΔW.

    Args:
        factors: The layout of the adapters.
        travelled: Stack → the stack as clients will decode it.
    """

    folds_parts = False

    def __init__(self, factors: Factors, travelled: Callable[[Tensor], Tensor] = lambda stack: stack) -> None:
        super().__init__()
        self._factors_of, self._travelled = factors, travelled
        self._stack, self._mean_square = torch.empty(0), 0.0

    def fold(self, updates: Mapping[int, tuple[Tensor, int]]) -> Tensor:
        """Stack all updates as one part; return the stack."""
        total = sum(num_examples for _, num_examples in updates.values())
        self._mean_square = fsum(n / total * self._factors_of.squared_norm(own) for own, n in updates.values())
        self._stack = self._factors_of.stack(updates)
        return self._stack

    def aggregate(self) -> Aggregate:
        """Return ΔW with the stack whose product it is, once that has travelled."""
        mean = self._factors_of.product(self._travelled(self._stack))
        squared = float(mean.double().square().sum())
        rho = min(1.0, squared / self._mean_square) if self._mean_square > 0 else 1.0
        return Aggregate(mean, rho, squared / mean.numel(), stack=self._stack)
