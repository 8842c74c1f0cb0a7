"""A model in half-layer blocks ends, with threads and chunks, bitwise as the oracle that trains it in one loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engines import run_here, server_plan
from parablock.algorithm.parablock import same
from parablock.algorithm.sequential import OracleProblem, run_sequential
from parablock.clock import VirtualClock
from parablock.data.batches import Batch
from parablock.engine.update_form import Differences
from parablock.model.blocks import partition_blocks
from parablock.model.params import Replica
from parablock.trace import Trace
from parablock.training.local import LocalArguments, train_block
from parablock.training.trainer import Trained
from parablock.wire.quantize import Encoding
from parablock.wire.transport import Link
from toy import ToyTrainer

EXAMPLES, ROUNDS = [2, 3], 6
ARGUMENTS = LocalArguments(learning_rate=0.01)


class HalfLayers:
    """Local training of all clients with one model, which the virtual clock lends to one of them at a time."""

    def __init__(self, model: LlamaForCausalLM, split: str) -> None:
        self.replica = Replica(model, partition_blocks(model, layers_per_block=2, split=split))
        self.params = [self.replica.read(block.index) for block in self.replica.blocks]

    def solve(self, client_id: int, round_index: int, block_index: int, working: tuple[Tensor, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(100 * client_id + round_index)
        ids = torch.randint(64, (2, 8), generator=generator)
        batch = Batch(ids, torch.ones_like(ids), ids)
        self.replica.load_all(working)
        return train_block(
            self.replica,
            block_index,
            working[block_index],
            [[batch]],
            ARGUMENTS,
            first_step=0,
            total_steps=ROUNDS,
            moments=None,
        ).trained


class ClientOf(ToyTrainer):
    """One client's trainer."""

    def __init__(self, model: HalfLayers, client_id: int) -> None:
        super().__init__(client_id, EXAMPLES[client_id], step_time_s=0.5)
        self._model = model

    def train(self, round_index, block_index, num_local_steps, steps_before, working) -> Trained:
        return Trained(self._model.solve(self.client_id, round_index, block_index, working), 0.0)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_threads_equal_the_oracle_on_half_layers(delay: int, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    halves = HalfLayers(tiny_llama(), "attention_mlp")
    encoding = Encoding("float32", chunk_bytes=4096)
    plan = server_plan(2, ROUNDS, delay, Differences(encoding), schedule="cyclic")
    found = run_here(
        halves.params,
        [ClientOf(halves, client_id) for client_id in range(2)],
        plan,
        Trace(VirtualClock()),
        link=Link(1.0, 0.5, 0.01),
    )
    expected = run_sequential(halves.params, OracleProblem(EXAMPLES, ROUNDS, delay), halves.solve)
    assert same(found.server.params, expected.server.params)
    assert all(same(client.base, expected.server.view) for client in found.clients)
    assert len(halves.params) == 4  # the controls: whole layers, and another delay
    layers = HalfLayers(tiny_llama(), "layer")
    whole = run_sequential(layers.params, OracleProblem(EXAMPLES, ROUNDS, delay), layers.solve)
    assert sum(map(torch.numel, whole.server.params)) == sum(map(torch.numel, expected.server.params))
    assert not torch.equal(
        torch.cat(whole.server.params).sort().values, torch.cat(expected.server.params).sort().values
    )
    later = run_sequential(halves.params, OracleProblem(EXAMPLES, ROUNDS, delay + 1), halves.solve)
    assert not same(later.server.params, expected.server.params)
