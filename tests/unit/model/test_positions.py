"""Examples that are longer than a model's positions."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from parablock.errors import ModelError
from parablock.model.positions import check_length

SIZE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def outline(config: PreTrainedConfig) -> object:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=48),
        OPTConfig(**SIZE, ffn_dim=16, max_position_embeddings=48, word_embed_proj_dim=16),
        GPTNeoConfig(**SIZE | {"num_layers": 1}, attention_types=[[["global"], 1]], max_position_embeddings=48),
    ],
    ids=lambda config: config.model_type,
)
def test_a_table_of_positions_ends_where_it_ends(config: PreTrainedConfig):
    assert check_length(outline(config), 48) == []
    with pytest.raises(ModelError, match=r"data\.max_length is 49, and .* has 48 positions") as caught:
        check_length(outline(config), 49)
    assert "data.max_length: 48" in caught.value.remedy


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZE, intermediate_size=16, max_position_embeddings=48),
        GPTNeoXConfig(**SIZE, intermediate_size=16, max_position_embeddings=48),
    ],
    ids=lambda config: config.model_type,
)
def test_rotary_positions_go_on_with_a_warning(config: PreTrainedConfig):
    assert check_length(outline(config), 48) == []
    (warning,) = check_length(outline(config), 49)
    assert warning.startswith(
        "warning: data.max_length is 49, and the model was trained on texts of up to 48 tokens"
    )


def test_a_model_without_positions_has_no_limit():
    assert check_length(outline(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)), 10_000) == []
