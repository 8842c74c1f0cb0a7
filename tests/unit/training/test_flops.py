"""Operations of a step against those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config

from parablock.model.blocks import Block, partition_blocks
from parablock.model.params import Replica
from parablock.training.flops import FlopModel, Tokens
from planning import batch, loss_of

LAYER_MATRICES = 32 * (32 + 16 + 16 + 32 + 3 * 64)
"""Of `tiny_llama`: q, k, v, o, and three of the MLP, whose width is 64."""


def counted_flops(model: Any, blocks: tuple[Block, ...], index: int, **options: bool) -> int:
    replica = Replica(model, blocks)
    replica.activate(index, **options)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch()).backward()
    replica.deactivate()
    by_module = counter.get_flop_counts().items()
    # some releases of Transformers make the angles of positions with a product, which has no part in the layers
    angles = sum(sum(counts.values()) for name, counts in by_module if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("architecture", ["llama, tied", "llama, untied", "gpt2"])
def test_operations_of_every_block_are_those_that_torch_counts(architecture: str, tiny_llama: Any) -> None:
    if architecture == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=128, bos_token_id=0, eos_token_id=0
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    else:
        config = tiny_llama().config
        config.tie_word_embeddings = architecture == "llama, tied"
    # torch counts the products of eager attention only; that does not make its scores again in the backward
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ends = architecture != "gpt2"
    blocks = partition_blocks(model, layers_per_block=1, include_embeddings=ends, include_head=ends)
    flops, tokens = FlopModel(model), Tokens.of(batch())
    scores = 2 * tokens.pairs * flops.attention_width
    predicted = [flops.step(block, tokens) - scores * (flops.num_layers - block.lowest_layer) for block in blocks]
    assert predicted == [counted_flops(model, blocks, block.index) for block in blocks]
    assert len(set(predicted)) == len(blocks)
    if architecture == "llama, tied":
        blocks = partition_blocks(model, layers_per_block=1, split="attention_mlp")
        reached = [flops.num_layers - block.lowest_layer - (block.half == "mlp") for block in blocks]
        of_halves = [flops.step(block, tokens) - scores * up for block, up in zip(blocks, reached, strict=True)]
        assert of_halves == [counted_flops(model, blocks, block.index) for block in blocks]
        assert not set(of_halves) & set(predicted)


def test_checkpointing_adds_another_forward_from_the_lowest_layer_up(tiny_llama: Any) -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama().config, attn_implementation="eager")
    blocks = partition_blocks(model, layers_per_block=1)
    flops = FlopModel(model, gradient_checkpointing=True)
    for block in blocks:
        counted = counted_flops(model, blocks, block.index, gradient_checkpointing=True)
        # torch does not make the last product of a layer again, which nothing needs
        assert counted <= flops.step(block, Tokens.of(batch())) <= 1.12 * counted
        assert FlopModel(model).step(block, Tokens.of(batch())) < counted


def test_tokens_of_a_batch_count_padding_and_labels_and_add_up() -> None:
    # 3 examples of 16 positions; the last 8 of each are labels, predicted by positions 7 … 14
    tokens = Tokens.of(batch(3, 16))
    assert tokens == Tokens(positions=48, pairs=48 * 16, labels=24)
    assert tokens + Tokens.of(batch(1, 4)) == Tokens(52, 768 + 16, 26)
    assert Tokens.at_most(num_examples=3, max_length=16) == Tokens(48, 768, 48)
