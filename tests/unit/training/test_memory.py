"""Memory of a client and of all in one process against shapes, and against what autograd and the system keep."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from parablock.data.batches import Batch
from parablock.model.blocks import partition_blocks, whole_model
from parablock.model.params import Replica
from parablock.training.memory import (
    LORA_RANK,
    PROCESS_BYTES,
    WAYS,
    FreedMemory,
    Place,
    memory_in_one_process,
    memory_per_client,
)
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


def all_of(model: Any, on_gpu: bool = False, **sections: Any) -> tuple[Place, Any]:
    config = config_of(**sections)
    memory = memory_of(model, **sections)[WAYS[config.federation.traits.trains]]
    return memory_in_one_process(model, memory, config, on_gpu=on_gpu), memory


def federation(num_clients: int, **keys: Any) -> dict[str, Any]:
    return {"federation": {"num_clients": num_clients, "method": "fedavg", "delay": 0} | keys}


def test_under_the_real_clock_each_client_has_a_model_and_under_the_virtual_one_they_share_it(tiny_llama: Any):
    model = tiny_llama()
    virtual, moments = {"engine": {"clock": "virtual"}}, {"train": {"optimizer_state": "auto"}}
    (real4, of_one), (real5, _) = (all_of(model, **federation(n), **moments) for n in (4, 5))
    own = of_one.base_copy + of_one.updates + of_one.optimizer_state  # fedavg trains the same in each round
    assert real5.host - real4.host == of_one.total + of_one.optimizer_state
    (shared4, _), (shared5, _) = (all_of(model, **federation(n), **virtual, **moments) for n in (4, 5))
    assert shared5.host - shared4.host == own
    visit = of_one.gradients + of_one.optimizer_state + of_one.activations
    assert real4.host - shared4.host == 4 * of_one.parameters + 3 * visit
    assert real4.host > 4 * of_one.total + of_one.parameters + PROCESS_BYTES and real4.device == 0


def test_who_computes_at_once_keeps_moments_or_is_on_a_gpu_counts(tiny_llama: Any):
    model = tiny_llama()
    (everyone, of_one), (half, _), (pooled, _) = (
        all_of(model, **federation(8, **keys)) for keys in ({}, {"participation": 0.5}, {"method": "central"})
    )
    visit = of_one.gradients + of_one.optimizer_state + of_one.activations
    assert everyone.host - half.host == 4 * visit
    assert pooled.host < everyone.host / 2 or pooled.host - PROCESS_BYTES < (everyone.host - PROCESS_BYTES) / 4
    kept, reset = (
        all_of(model, **federation(8, method="parablock", delay=1), train={"optimizer_state": how})[0]
        for how in ("keep", "reset")
    )
    assert kept.host - reset.host == 8 * 4 * 8 * (LAYER_MATRICES + 2 * 32)  # two moments of four blocks, of eight
    (on_cpu, of_one), (split, _) = (all_of(model, on_gpu, **federation(8)) for on_gpu in (False, True))
    assert split.host + split.device == on_cpu.host
    assert split.host == PROCESS_BYTES + 9 * (of_one.base_copy + of_one.updates)


@pytest.mark.skipif(not hasattr(psutil, "PROCFS_PATH"), reason="only glibc keeps memory for each thread")
def test_memory_that_threads_have_freed_is_given_back_when_it_is_much():
    def fill() -> torch.Tensor:
        torch.zeros(7 << 20)  # sizes up to one that was freed are kept
        many = [torch.zeros(1 << 20) for _ in range(40)]  # 4 MiB each
        return many[-1]  # lies above the others

    freed, lazy = FreedMemory(most_bytes=1 << 26), FreedMemory(most_bytes=1 << 40)
    before = psutil.Process().memory_info().rss
    with ThreadPoolExecutor(1) as thread:
        last = thread.submit(fill).result()
        lazy.give_back()
        kept = psutil.Process().memory_info().rss - before
        freed.give_back()
        left = psutil.Process().memory_info().rss - before
    assert last.sum() == 0
    assert kept > 100 << 20 and left < 40 << 20
