"""A small non-convex federated problem whose blocks interact, for tests of the method and the engines.

Client i minimises f_i(x) = ½‖tanh(A_i x) − c_i‖² / n over x ∈ R^{B·n}. The rows of A_i mix all blocks, so a
stale block changes every gradient (a separable toy would pass everything), and A_i, c_i differ by client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parablock.seeding import seed_for
from parablock.training.trainer import Trained

SIZE = 5


def initial(num_blocks: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple((0.3 * torch.randn(SIZE, generator=generator)).to(dtype) for _ in range(num_blocks))


def objective(client_id: int, num_blocks: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(100 + client_id)
    matrix = torch.randn(3 * SIZE, num_blocks * SIZE, generator=generator) / num_blocks**0.5
    target = torch.tanh(torch.randn(3 * SIZE, generator=generator) + 0.5 * client_id)

    def value(x: Tensor) -> Tensor:
        return 0.5 * (torch.tanh(matrix @ x) - target).square().sum() / SIZE

    return value


def solve(
    client_id: int,
    round_index: int,
    block_index: int,
    working: tuple[Tensor, ...],
    *,
    learning_rate: float = 0.2,
    num_local_steps: int = 3,
) -> Tensor:
    """Take K gradient steps on one block."""
    del round_index
    function = objective(client_id, len(working))
    blocks = [block.float().clone() for block in working]
    for _ in range(num_local_steps):
        active = blocks[block_index].clone().requires_grad_()
        loss = function(torch.cat([active if b == block_index else other for b, other in enumerate(blocks)]))
        (gradient,) = torch.autograd.grad(loss, active)
        blocks[block_index] = blocks[block_index] - learning_rate * gradient
    return blocks[block_index]


def loss_of(params: tuple[Tensor, ...], num_clients: int) -> float:
    x = torch.cat([block.float() for block in params])
    return sum(float(objective(i, len(params))(x)) for i in range(num_clients)) / num_clients


class ToyTrainer:
    """`solve` behind the engine's interface; others replace `train`."""

    def __init__(self, client_id: int, num_examples: int = 1, step_time_s: float | None = 1.0) -> None:
        self.client_id, self.num_examples, self.step_time_s = client_id, num_examples, step_time_s

    def train(self, round_index, block_index, num_local_steps, steps_before, working) -> Trained:
        return Trained(solve(self.client_id, round_index, block_index, working), 0.0)

    def memory(self) -> dict[str, Tensor]:
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        assert not memory


class Walker(ToyTrainer):
    """A trainer of blocks of any size whose step depends on where it starts, on the client and on the round."""

    def __init__(self, client_id: int, step_time_s: float) -> None:
        super().__init__(client_id, 3 + client_id, step_time_s)

    def train(self, round_index, block_index, num_local_steps, steps_before, working) -> Trained:
        generator = torch.Generator().manual_seed(seed_for(0, "walk", self.client_id, round_index))
        v, other = working[block_index].float(), working[block_index - 1].float()
        return Trained(0.9 * v + 0.1 * other + 0.01 * torch.randn(v.shape, generator=generator), 0.0)


class Idle(ToyTrainer):
    """A trainer whose steps take simulated time only; it sends as much as the block, or so many elements."""

    def __init__(self, step_time_s: float | None = None, sends: int | None = None) -> None:
        super().__init__(0, 1, step_time_s)
        self._sends = sends

    def train(self, round_index: int, block_index: int, *rest: Any) -> Trained:
        block = rest[-1][block_index].float() if self._sends is None else torch.zeros(self._sends)
        return Trained(block + 0.001 * (1 + round_index), 1.0)
