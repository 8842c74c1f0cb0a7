"""FLoRA: LoRA whose aggregate is exact, because the server stacks the adapters instead of averaging them.

    ΔW = Σ w_k (α / r) B_k A_k = (α / r) [B_1 … B_M] [w_1 A_1; …; w_M A_M]

Source: Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations,
2024 (arXiv 2409.05976).

| symbol | here |
|---|---|
| A_k, B_k | `Factors.split(…)` of what client k sends, one pair for each matrix |
| w_k | number of examples of client k over that of all |
| ⊕, stacking | `Factors.stack(…)`: A by rows, times w_k; B by columns |
| ΔW | `Factors.product(…)`: what the server and every client add to the matrices, bitwise the same |

Every client trains adapters that are drawn anew in each round, since those of the last one are in the matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from parablock.algorithm.aggregate import Aggregate
from parablock.algorithm.robust import RoundAggregation
from parablock.errors import CodecError

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Factors:
    """What flat vectors of A and B mean: for each matrix A by rows, then B by rows.

    Attributes:
        shapes: (outputs, inputs) of each matrix.
        transposed: Whether the model keeps a matrix as inputs × outputs, as GPT-2 does.
        rank: r of one client.
        scale: α / r.
    """

    shapes: tuple[tuple[int, int], ...]
    transposed: tuple[bool, ...]
    rank: int
    scale: float

    @property
    def num_elements(self) -> int:
        """Of the adapters of one client."""
        return self.rank * sum(outputs + inputs for outputs, inputs in self.shapes)

    def split(self, flat: Tensor) -> Pairs:
        """Give A (rank × inputs) and B (outputs × rank) of each matrix, of one client or stacked.

        Raises:
            CodecError: It is of no whole number of clients.
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
        """Give (α / r) B A of all matrices, one after the other as the model keeps them: flat, fp32."""
        # cloned, so that the sums are done in the same order wherever in memory a message lies
        products = [self.scale * (b.float().clone() @ a.float().clone()) for a, b in self.split(flat)]
        laid = [p.T if turned else p for p, turned in zip(products, self.transposed, strict=True)]
        return torch.cat([matrix.reshape(-1) for matrix in laid])

    def stack(self, updates: Mapping[int, tuple[Tensor, int]]) -> Tensor:
        """Stack the adapters of all clients, in ascending client_id, so that their product is ΔW."""
        total = sum(num_examples for _, num_examples in updates.values())
        clients = [(self.split(updates[i][0]), updates[i][1] / total) for i in sorted(updates)]
        pieces = []
        for matrix in range(len(self.shapes)):
            pieces.append(torch.cat([weight * pairs[matrix][0] for pairs, weight in clients]))
            pieces.append(torch.cat([pairs[matrix][1] for pairs, _ in clients], dim=1))
        return torch.cat([piece.reshape(-1) for piece in pieces])

    def squared_norm(self, flat: Tensor) -> float:
        """Give the squared norm of `product`, from products of r × r."""
        squares = ((b.double().T @ b.double()) * (a.double() @ a.double().T) for a, b in self.split(flat))
        return self.scale**2 * fsum(float(square.sum()) for square in squares)


class StackAggregation(RoundAggregation):
    """One round's adapters on their way into an aggregate, which has the stack beside ΔW."""

    folds_parts = False

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self._factors_of, self._stack, self._mean_square = factors, torch.empty(0), 0.0

    def fold(self, updates: Mapping[int, tuple[Tensor, int]]) -> Tensor:
        """Stack all updates, which are one part; gives the stack."""
        total = sum(num_examples for _, num_examples in updates.values())
        self._mean_square = fsum(n / total * self._factors_of.squared_norm(own) for own, n in updates.values())
        self._stack = self._factors_of.stack(updates)
        return self._stack

    def aggregate(self) -> Aggregate:
        """Give ΔW, with the stack that it is the product of."""
        mean = self._factors_of.product(self._stack)
        squared = float(mean.double().square().sum())
        rho = min(1.0, squared / self._mean_square) if self._mean_square > 0 else 1.0
        return Aggregate(mean, rho, squared / mean.numel(), stack=self._stack)
