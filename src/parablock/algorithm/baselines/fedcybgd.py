"""FedCyBGD: one client at a time, in turn, each with blocks of its own; what others did travels as catch-up.

Source: Wang et al., Save It All: Enabling Full Parameter Tuning for Federated Large Language Models via Cycle
Block Gradient Descent, 2024 (arXiv 2406.11187). What is left out: the compression of the blocks that a
client only reads.
"""

from __future__ import annotations

from collections.abc import Sequence


def client_in_turn(history: Sequence[int], round_index: int, *, num_clients: int, num_blocks: int) -> int:
    """Give the one client that trains the block of a round.

    With at least as many blocks as clients, block b is client b mod M's at every visit; with fewer, clients
    b, b + B, b + 2B … share it and take turns.

    Args:
        history: b_0 … b_t.
        round_index: t.
        num_clients: M.
        num_blocks: B.
    """
    block = history[round_index]
    if num_blocks >= num_clients:
        return block % num_clients
    owners = range(block, num_clients, num_blocks)
    earlier_visits = list(history[:round_index]).count(block)
    return owners[earlier_visits % len(owners)]
