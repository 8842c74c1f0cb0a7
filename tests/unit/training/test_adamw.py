"""What sets each baseline apart, as arithmetic."""

from __future__ import annotations

import pytest
import torch

from parablock.algorithm.schedule import client_in_turn
from parablock.training.adamw import add_proximal_gradient


def test_the_proximal_gradient_pulls_towards_the_start() -> None:
    weight, anchor = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0])
    weight.grad = torch.tensor([10.0, 20.0])
    add_proximal_gradient([weight], [anchor], 0.5)
    assert weight.grad.tolist() == [10 + 0.5 * (1 - 3), 20.0]


def test_a_weight_without_a_gradient_is_not_pulled() -> None:
    weight = torch.ones(2)
    add_proximal_gradient([weight], [torch.zeros(2)], 0.5)
    assert weight.grad is None


@pytest.mark.parametrize(("num_clients", "num_blocks"), [(4, 4), (2, 5), (3, 8), (5, 2), (8, 3), (3, 1)])
def test_blocks_have_owners_and_everybody_has_a_turn(num_clients: int, num_blocks: int) -> None:
    history = [t % num_blocks for t in range(6 * num_clients * num_blocks)]
    turns = [
        (client_in_turn(history, t, num_clients=num_clients, num_blocks=num_blocks), block)
        for t, block in enumerate(history)
    ]
    assert {client for client, _ in turns} == set(range(num_clients))
    assert {block for _, block in turns} == set(range(num_blocks))
    blocks_of = {client: {b for c, b in turns if c == client} for client in range(num_clients)}
    owners = [sum(block in blocks for blocks in blocks_of.values()) for block in range(num_blocks)]
    if num_blocks >= num_clients:
        assert owners == [1] * num_blocks
    else:
        assert {len(blocks) for blocks in blocks_of.values()} == {1}
