"""Memory of a client against shapes, and against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parablock.data.batches import Batch
from parablock.model.blocks import partition_blocks, whole_model
from parablock.model.params import Replica
from parablock.plan.memory import LORA_RANK, memory_per_client
from planning import batch, config_of, loss_of

LAYER_MATRICES = 32 * (32 + 16 + 16 + 32 + 3 * 64)
"""Of `tiny_llama`: q, k, v, o, and three of the MLP, whose width is 64."""


def memory_of(model: Any, **sections: Any) -> dict[str, Any]:
    blocks = partition_blocks(model, layers_per_block=1)
    return memory_per_client(model, blocks, config_of(**sections))


def test_memory_of_what_is_counted_follows_from_shapes(tiny_llama: Any) -> None:
    model = tiny_llama()  # fp32, 4 layers of 32, MLP of 64, vocabulary of 128, tied
    layer = LAYER_MATRICES + 2 * 32  # two norms
    all_parameters = 4 * layer + 128 * 32 + 32
    adapters = LORA_RANK * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    found = memory_of(model, federation={"delay": 1})
    for name, trained, exchanged in (
        ("block", layer, 4 * layer),
        ("lora", adapters, adapters),
        ("full", all_parameters, all_parameters),
    ):
        memory = found[name]
        assert (memory.gradients, memory.optimizer_state) == (4 * trained, 8 * trained)
        assert (memory.base_copy, memory.updates, memory.fp32_copies) == (4 * exchanged, 2 * 4 * trained, 0)
        assert memory.parameters == 4 * (all_parameters + (adapters if name == "lora" else 0))
        assert memory.total == sum(vars(memory).values())


def test_muon_keeps_one_moment_of_the_matrices_of_layers_and_adamw_two_of_the_rest(tiny_llama: Any) -> None:
    model = tiny_llama()
    usual, muon = memory_of(model), memory_of(model, train={"optimizer": "muon"})
    spared = {name: usual[name].optimizer_state - muon[name].optimizer_state for name in usual}
    # all matrices of a layer, of all adapters, of all layers; not norms and embeddings
    assert spared == {
        "block": 4 * LAYER_MATRICES,
        "lora": usual["lora"].optimizer_state // 2,
        "full": 4 * 4 * LAYER_MATRICES,
    }
    assert all(muon[name].total == usual[name].total - spared[name] for name in usual)


def test_bfloat16_halves_the_model_and_adds_master_copies_of_what_is_trained(tiny_llama: Any) -> None:
    float32, bfloat16 = memory_of(tiny_llama()), memory_of(tiny_llama(dtype="bfloat16"))
    for name in ("block", "full"):
        assert 2 * bfloat16[name].parameters == float32[name].parameters
        assert bfloat16[name].fp32_copies == bfloat16[name].gradients == float32[name].gradients
    assert bfloat16["lora"].fp32_copies == 0  # adapters are fp32 in any case


def test_blocks_and_adapters_take_less_than_all_parameters(tiny_llama: Any) -> None:
    found = {name: memory.total for name, memory in memory_of(tiny_llama(num_layers=8)).items()}
    assert found["block"] < found["full"] and found["lora"] < found["full"]


def test_a_delay_keeps_another_update_and_checkpointing_saves_activations(tiny_llama: Any) -> None:
    base = memory_of(tiny_llama(), federation={"delay": 1})["block"]
    delayed = memory_of(tiny_llama(), federation={"delay": 3})["block"]
    assert delayed.updates == 2 * base.updates and delayed.activations == base.activations
    checkpointed = memory_of(tiny_llama(), train={"gradient_checkpointing": True})["block"]
    assert checkpointed.activations < base.activations and checkpointed.gradients == base.gradients


def kept_bytes(model: Any, given: Batch) -> int:
    """Add up what autograd keeps for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, given)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimated_activations_are_near_what_autograd_keeps(dtype: str, tiny_llama: Any) -> None:
    model = tiny_llama(num_layers=6, hidden_size=64, dtype=dtype)
    found = memory_of(model, data={"train": ["a"], "max_length": 64}, train={"per_device_train_batch_size": 4})
    given = batch(4, 64)
    replica = Replica(model, partition_blocks(model, layers_per_block=1))
    replica.activate(0)
    assert found["block"].activations == pytest.approx(kept_bytes(model, given), rel=0.3)
    replica = Replica(model, whole_model(model))
    replica.activate(0)
    assert found["full"].activations == pytest.approx(kept_bytes(model, given), rel=0.3)
    assert found["full"].activations > 1.2 * found["block"].activations
