"""The partition into blocks, on a tiny random model of every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GPTNeoXJapaneseConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from parablock.errors import ModelError
from parablock.model.blocks import Block, find_layers, partition_blocks

NUM_LAYERS = 3
MODERN = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**MODERN),
    "llama, tied": lambda: LlamaConfig(**MODERN, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**MODERN),
    "qwen3": lambda: Qwen3Config(**MODERN, head_dim=8),
    "mistral": lambda: MistralConfig(**MODERN),
    "gemma2": lambda: Gemma2Config(**MODERN, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**MODERN, head_dim=8),
    "phi3": lambda: Phi3Config(**MODERN),
    "olmo2": lambda: Olmo2Config(**MODERN),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32, **ENDS),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=3,
        num_heads=2,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=4,
        max_position_embeddings=32,
        **ENDS,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**MODERN),
    "mpt": lambda: MptConfig(vocab_size=64, d_model=16, n_layers=3, n_heads=2, max_seq_len=32),
    "opt": lambda: OPTConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=32,
        word_embed_proj_dim=8,
    ),
}
INPUT_SIDE = {  # what each family calls the parameters before its layers
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt_neo": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight"},
    "mpt": {"transformer.wte.weight"},
    "opt": {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
        "model.decoder.project_in.weight",
    },
}
TIED = {"llama, tied", "gemma2", "gemma3", "gpt2", "gpt_neo", "mpt", "opt"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[family]())


def names_of(blocks: tuple[Block, ...]) -> list[str]:
    return [name for block in blocks for name in block.parameter_names]


# ── every family ────────────────────────────────────────────────────────────────────────────────────


def test_layer_blocks_are_ordered_disjoint_and_hold_every_layer_whole(model: PreTrainedModel):
    blocks = partition_blocks(model, layers_per_block=2)
    assert [(block.index, block.name, block.layers) for block in blocks] == [
        (0, "layers.0-1", (0, 1)),
        (1, "layers.2", (2,)),
    ]
    assert [block.lowest_layer for block in blocks] == [0, 2]
    names = names_of(blocks)
    assert len(set(names)) == len(names)
    path, layers = find_layers(model)
    assert len(layers) == NUM_LAYERS
    expected = [f"{path}.{i}.{name}" for i, layer in enumerate(layers) for name, _ in layer.named_parameters()]
    assert names == expected
    for block in blocks:
        assert block.num_parameters == sum(model.get_parameter(name).numel() for name in block.parameter_names)


def test_halves_are_the_attention_and_the_mlps_of_their_layers(model: PreTrainedModel, family: str):
    blocks = partition_blocks(model, layers_per_block=2, split="attention_mlp")
    assert [(block.name, block.layers, block.lowest_layer, block.half) for block in blocks] == [
        ("layers.0-1.attention", (0, 1), 0, "attention"),
        ("layers.0-1.mlp", (0, 1), 0, "mlp"),
        ("layers.2.attention", (2,), 2, "attention"),
        ("layers.2.mlp", (2,), 2, "mlp"),
    ]
    assert sorted(names_of(blocks)) == sorted(names_of(partition_blocks(model, layers_per_block=1)))
    path, _ = find_layers(model)
    children = {
        half: {
            name.removeprefix(f"{path}.").split(".")[1]
            for block in blocks
            if block.half == half
            for name in block.parameter_names
        }
        for half in ("attention", "mlp")
    }
    assert not children["attention"] & children["mlp"]
    expected = {
        "gpt2": {"ln_2", "mlp"},
        "gpt_neo": {"ln_2", "mlp"},
        "mpt": {"norm_2", "ffn"},
        "opt": {"fc1", "fc2", "final_layer_norm"},
        "gemma2": {"pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"},
        "gemma3": {"pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"},
        "olmo2": {"mlp", "post_feedforward_layernorm"},
    }
    assert children["mlp"] == expected.get(family, {"post_attention_layernorm", "mlp"})


def test_a_layer_without_attention_has_no_halves(tiny_llama: Callable[..., LlamaForCausalLM]):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mixer, layer.mix_norm = layer.self_attn, layer.input_layernorm
        del layer.self_attn, layer.input_layernorm
    with pytest.raises(ModelError, match=r"(?s)layers.0.attention\) would have no parameters.*split: layer"):
        partition_blocks(model, layers_per_block=1, split="attention_mlp")


def test_embeddings_and_head_are_blocks_only_when_asked_for(model: PreTrainedModel, family: str):
    def named(**options: bool) -> list[str]:
        return [block.name for block in partition_blocks(model, layers_per_block=3, **options)]

    assert named() == ["layers.0-2"]
    assert named(include_embeddings=True) == ["embeddings", "layers.0-2"]
    assert named(include_head=True) == ["layers.0-2", "head"]
    blocks = partition_blocks(model, layers_per_block=3, include_embeddings=True, include_head=True)
    assert [block.index for block in blocks] == [0, 1, 2]
    # with both asked for, every parameter of the model is in exactly one block
    assert sorted(names_of(blocks)) == sorted(name for name, _ in model.named_parameters())
    assert sum(block.num_parameters for block in blocks) == model.num_parameters()
    assert set(blocks[0].parameter_names) == INPUT_SIDE.get(family, {"model.embed_tokens.weight"})


def test_tied_embeddings_are_one_parameter_of_one_block(model: PreTrainedModel, family: str):
    token_embeddings = model.get_input_embeddings().weight
    tied = token_embeddings is model.get_output_embeddings().weight
    assert tied is (family in TIED)

    def holders(**options: bool) -> list[str]:
        blocks = partition_blocks(model, layers_per_block=1, **options)
        return [
            block.name
            for block in blocks
            if any(model.get_parameter(name) is token_embeddings for name in block.parameter_names)
        ]

    assert holders() == []
    assert holders(include_embeddings=True) == ["embeddings"]
    assert holders(include_embeddings=True, include_head=True) == ["embeddings"]
    assert holders(include_head=True) == (["head"] if tied else [])


def test_a_head_that_holds_the_tied_embeddings_backpropagates_to_the_first_layer(
    model: PreTrainedModel, family: str
):
    head = partition_blocks(model, layers_per_block=1, include_head=True)[-1]
    assert head.lowest_layer == (0 if family in TIED else NUM_LAYERS)
    head = partition_blocks(model, layers_per_block=1, include_head=True, include_embeddings=True)[-1]
    assert head.lowest_layer == NUM_LAYERS


def test_each_block_trains_whole_and_alone(model: PreTrainedModel):
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    blocks = partition_blocks(model, layers_per_block=2, include_embeddings=True, include_head=True)
    for block in blocks:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in block.parameter_names)
        model(input_ids=ids, labels=ids).loss.backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == set(block.parameter_names)
        for name in trained:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            if not name.endswith("k_proj.bias"):  # softmax does not see a constant added to all keys
                assert gradient.abs().sum() > 0, name


# ── what is refused, and unknown architectures ──────────────────────────────────────────────────────


@pytest.mark.parametrize("layers_per_block", [-1, 0, 5])
def test_layers_per_block_must_fit_the_model(tiny_llama: Callable[..., LlamaForCausalLM], layers_per_block: int):
    model = tiny_llama(num_layers=4)
    assert len(partition_blocks(model, layers_per_block=4)) == 1
    with pytest.raises(ModelError, match=rf"(?s)layers_per_block is {layers_per_block}, .* 4 decoder .* 1 to 4"):
        partition_blocks(model, layers_per_block=layers_per_block)


class Unfamiliar(LlamaForCausalLM):
    """An architecture whose layers no rule finds: they are in two lists, neither as long as the model is deep."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        layers = list(self.model.layers)
        del self.model.layers
        self.model.trunk = nn.ModuleList(layers[:3])
        self.model.tail = nn.ModuleList(layers[3:])
        self.model.empty = nn.ModuleList()


@pytest.fixture
def unfamiliar() -> Unfamiliar:
    return Unfamiliar(LlamaConfig(**(MODERN | {"num_hidden_layers": 4})))


def test_an_unknown_architecture_is_refused_with_its_lists_and_how_to_name_them(unfamiliar: Unfamiliar):
    with pytest.raises(ModelError) as caught:
        partition_blocks(unfamiliar, layers_per_block=1)
    text = str(caught.value)
    assert "layers of Unfamiliar (4 of them) were not found" in text
    assert "model.trunk (3 entries), model.tail (1 entries)" in text
    assert "blocks.layers_path: model.layers" in text


def test_layers_path_names_the_layers(unfamiliar: Unfamiliar):
    blocks = partition_blocks(unfamiliar, layers_per_block=2, layers_path="model.trunk")
    assert [block.layers for block in blocks] == [(0, 1), (2,)]
    assert {block.layers_path for block in blocks} == {"model.trunk"}
    assert all(name.startswith("model.trunk.") for name in names_of(blocks))


@pytest.mark.parametrize("path", ["model.layers", "model.norm", "model.empty", "zebra", ""])
def test_a_wrong_layers_path_is_refused_with_the_lists_that_there_are(unfamiliar: Unfamiliar, path: str):
    with pytest.raises(ModelError, match=rf"(?s)layers_path is '{path}'.*model\.trunk \(3 entries\)"):
        partition_blocks(unfamiliar, layers_per_block=1, layers_path=path)


def test_lists_inside_a_layer_and_outside_the_decoder_are_not_taken_for_the_layers():
    class WithExperts(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in self.model.layers)
            self.tower = nn.ModuleList(nn.Linear(2, 2) for _ in self.model.layers)

    model = WithExperts(LlamaConfig(**MODERN))
    assert find_layers(model)[0] == "model.layers"
    assert "model.layers.2.experts.2.bias" in names_of(partition_blocks(model, layers_per_block=1))
    model.model.second = nn.ModuleList(nn.Linear(2, 2) for _ in range(NUM_LAYERS))
    with pytest.raises(ModelError, match="were not found"):  # two candidates: no guess is made
        find_layers(model)


def test_a_head_that_is_called_an_embedding_is_the_head_all_the_same():
    config = GPTNeoXJapaneseConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_multiple_size=2,
        tie_word_embeddings=False,
        **ENDS,
    )
    model = AutoModelForCausalLM.from_config(config)
    blocks = partition_blocks(model, layers_per_block=1, include_embeddings=True, include_head=True)
    assert model.embed_out is model.get_output_embeddings()
    assert blocks[0].parameter_names == ("gpt_neox_japanese.embed_in.weight",)
    assert "embed_out.weight" in blocks[-1].parameter_names


def test_a_block_without_parameters_of_its_own_is_refused():
    class OneLayerManyTimes(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.layers = nn.ModuleList([self.model.layers[0]] * NUM_LAYERS)

    model = OneLayerManyTimes(LlamaConfig(**MODERN))
    assert len(partition_blocks(model, layers_per_block=3)) == 1
    with pytest.raises(ModelError, match=r"Block 1 \(layers\.1\) would have no parameters"):
        partition_blocks(model, layers_per_block=1)
