"""A replica: parameters as views into one flat buffer for each block, one block active at a time."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from parablock.errors import ModelError
from parablock.model.blocks import partition_blocks
from parablock.model.params import Replica

IDS = torch.arange(24).view(2, 12)
NUM_LAYERS = 4
Make = Callable[..., Replica]


@pytest.fixture
def make_replica(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., Replica]:
    def make(dtype: str = "float32", seed: int = 0, **options: bool) -> Replica:
        model = tiny_llama(num_layers=NUM_LAYERS, dtype=dtype, seed=seed)
        return Replica(model, partition_blocks(model, layers_per_block=1, **options))

    return make


# ── flat buffers ────────────────────────────────────────────────────────────────────────────────────


def test_making_a_replica_changes_no_value(tiny_llama: Callable[..., LlamaForCausalLM], make_replica: Make):
    model = make_replica(include_embeddings=True, include_head=True).model
    plain, other = tiny_llama(num_layers=NUM_LAYERS), tiny_llama(num_layers=NUM_LAYERS, seed=1)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert not torch.equal(model(IDS).logits, other(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_is_one_dense_vector_of_which_the_parameters_are_views(make_replica: Make, dtype: str):
    replica = make_replica(dtype)
    for block in replica.blocks:
        parameters = [replica.model.get_parameter(name) for name in block.parameter_names]
        assert [id(p) for p in replica.parameters(block.index)] == [id(p) for p in parameters]
        buffer = replica.buffer(block.index)
        assert buffer.shape == (block.num_parameters,)
        assert buffer.dtype == getattr(torch, dtype)
        assert torch.equal(buffer, torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
        buffer.fill_(block.index + 1)
        assert all(bool((parameter == block.index + 1).all()) for parameter in parameters)
    storages = {replica.buffer(block.index).untyped_storage().data_ptr() for block in replica.blocks}
    assert len(storages) == NUM_LAYERS


def test_read_gives_a_copy_on_the_cpu(make_replica: Make):
    replica = make_replica("bfloat16")
    flat = replica.read(1)
    assert (flat.device.type, flat.dtype, flat.ndim) == ("cpu", torch.bfloat16, 1)
    replica.buffer(1).zero_()
    assert flat.abs().sum() > 0
    assert replica.read(1).abs().sum() == 0


def test_blocks_of_mixed_dtypes_are_refused(tiny_llama: Callable[..., LlamaForCausalLM]):
    model = tiny_llama(num_layers=2)
    model.model.layers[1].self_attn.to(torch.bfloat16)
    blocks = partition_blocks(model, layers_per_block=1)
    with pytest.raises(ModelError, match=r"(?s)block 1 \(layers\.1\).*bfloat16 on cpu, torch\.float32 on cpu"):
        Replica(model, blocks)


# ── load ────────────────────────────────────────────────────────────────────────────────────────────


def test_load_all_makes_one_replica_equal_to_another(make_replica: Make):
    source = make_replica(seed=1, include_embeddings=True, include_head=True)
    target = make_replica(seed=0, include_embeddings=True, include_head=True)
    assert not torch.equal(target.model(IDS).logits, source.model(IDS).logits)
    target.load_all([source.read(block.index) for block in source.blocks])
    assert torch.equal(target.model(IDS).logits, source.model(IDS).logits)
    source.buffer(2).zero_()  # no storage is shared
    assert not torch.equal(target.model(IDS).logits, source.model(IDS).logits)


def test_a_replica_keeps_nobodys_vector_alive(make_replica: Make):
    replica = make_replica()
    flat = replica.read(0) + 1
    known = ref(flat)
    replica.load(0, flat)
    assert torch.equal(replica.buffer(0), flat)
    del flat
    assert known() is None
    replica.load(0, torch.zeros_like(replica.buffer(0)))  # which may lie where the other did
    assert replica.buffer(0).abs().sum() == 0


def test_loading_the_same_object_again_copies_nothing_until_the_block_is_invalidated(make_replica: Make):
    replica = make_replica()
    flat = torch.randn(replica.blocks[1].num_parameters)
    replica.load(1, flat)
    replica.buffer(1).zero_()  # what training would do
    replica.load(1, flat)
    assert replica.read(1).abs().sum() == 0  # the object is known: no copy
    replica.invalidate(1)
    replica.load(1, flat)
    assert torch.equal(replica.read(1), flat)
    replica.buffer(1).zero_()
    replica.load(1, flat.clone())  # equal, and another object
    assert torch.equal(replica.read(1), flat)


def test_a_vector_of_another_size_or_dtype_is_refused(make_replica: Make):
    replica = make_replica()
    flat = replica.read(0)
    for wrong in (flat[:-1], flat.view(1, -1), flat.bfloat16()):
        with pytest.raises(ModelError, match=r"Block 0 \(layers\.0\) takes"):
            replica.load(0, wrong)
    with pytest.raises(ValueError, match="zip"):
        replica.load_all([flat])


# ── activate ────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_active_block_requires_gradients(make_replica: Make):
    replica = make_replica()

    def training() -> set[str]:
        return {name for name, parameter in replica.model.named_parameters() if parameter.requires_grad}

    assert training() == set()
    replica.activate(2)
    assert training() == set(replica.blocks[2].parameter_names)
    assert replica.model.training
    replica.model(IDS, labels=IDS).loss.backward()
    replica.activate(1)  # from one block to another: nothing of the first stays
    assert training() == set(replica.blocks[1].parameter_names)
    assert all(parameter.grad is None for parameter in replica.model.parameters())
    replica.model(IDS, labels=IDS).loss.backward()
    replica.deactivate()
    assert training() == set()
    assert all(parameter.grad is None for parameter in replica.model.parameters())
    assert not replica.model.training


def test_layers_that_cannot_be_checkpointed_are_refused_and_nothing_is_left_active(
    tiny_llama: Callable[..., LlamaForCausalLM],
):
    class Plain(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.mlp = inner

    model = tiny_llama(num_layers=2)
    model.model.layers = nn.ModuleList(Plain(layer.mlp) for layer in model.model.layers)
    replica = Replica(model, partition_blocks(model, layers_per_block=1))
    replica.activate(0)
    with pytest.raises(ModelError, match="Plain does not support gradient checkpointing"):
        replica.activate(0, gradient_checkpointing=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
