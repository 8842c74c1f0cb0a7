"""Files in GGUF: Transformers reads them as the same model, and what it could not is refused."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from parablock.errors import ModelError
from parablock.model import gguf_file
from parablock.model.gguf_file import silent_here, write_gguf
from parablock.model.pretrained import LoadedModel

ENDS = {"vocab_size": 304, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZE: dict[str, Any] = {
    **ENDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZE, **ROPE),
    "llama, tied": LlamaConfig(**SIZE, **ROPE, tie_word_embeddings=True),
    "llama, wide heads": LlamaConfig(**SIZE, **ROPE, head_dim=16),
    "mistral": MistralConfig(**SIZE, **ROPE, sliding_window=None),
    "mistral, a window as long as its context": MistralConfig(**SIZE, **ROPE, sliding_window=128),
    "qwen2": Qwen2Config(**SIZE, **ROPE),
    "qwen2, a window of no layer": Qwen2Config(
        **SIZE, **ROPE, use_sliding_window=True, sliding_window=100, max_window_layers=2
    ),
    "qwen3": Qwen3Config(**SIZE, **ROPE, head_dim=128),
}
STRETCHED = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "another family": (GPT2Config(**ENDS, n_embd=32, n_layer=2, n_head=4), "type gpt2 is not written as GGUF here"),
    "stretched positions": (LlamaConfig(**SIZE, rope_parameters=STRETCHED), r"are stretched \(linear\)"),
    "a window": (MistralConfig(**SIZE, **ROPE, sliding_window=8), "a sliding window of 8 tokens"),
    "a window beyond the text that is compared": (
        Qwen2Config(**SIZE, **ROPE, use_sliding_window=True, sliding_window=100, max_window_layers=1),
        "a sliding window of 100 tokens",
    ),
    "biases": (LlamaConfig(**SIZE, **ROPE, attention_bias=True), "does not read back"),
    "another activation": (
        LlamaConfig(**SIZE, **ROPE, hidden_act="gelu"),
        "what the settings make of them differs",
    ),
    "heads that the reader does not expect": (Qwen3Config(**SIZE, **ROPE, head_dim=16), "does not read back"),
}
IDS = torch.arange(2, 98)[None]


def made(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return LoadedModel(model, tokenizer, "made", {}, ())


def read(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits


def value_of(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_model_that_was_written(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    loaded = made(FAMILIES[name], tiny_tokenizer)
    with torch.no_grad():
        before = loaded.model(IDS).logits.clone()
    assert write_gguf(loaded, tmp_path / "model.gguf", name="mine") == "float32"
    assert torch.allclose(read(tmp_path / "model.gguf"), before, atol=1e-5)
    other = made(FAMILIES[name], tiny_tokenizer)
    other.model.model.layers[0].self_attn.q_proj.weight.data[0] += 0.1
    with torch.no_grad():
        assert not torch.allclose(other.model(IDS).logits, before, atol=1e-5)


def test_heads_in_the_order_of_others_are_noticed(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gguf_file, "_PERMUTED", ())
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.q_proj.weight differs"):
        write_gguf(made(FAMILIES["llama"], tiny_tokenizer), tmp_path / "model.gguf", name="mine")


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused(name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    config, says = REFUSED[name]
    with pytest.raises(ModelError, match=says):
        write_gguf(made(config, tiny_tokenizer), tmp_path / "model.gguf", name="mine")


def test_the_precision_of_matrices_is_as_asked_and_has_to_hold_them(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    sizes = {}
    for dtype in ("float32", "bfloat16", "float16"):
        loaded = made(FAMILIES["llama"], tiny_tokenizer)
        assert write_gguf(loaded, tmp_path / dtype, name="mine", dtype=dtype) == dtype  # type: ignore[arg-type]
        types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / dtype).tensors}
        short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
        assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == short
        assert types["blk.0.attn_norm.weight"] == "F32"
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert sizes["float16"] == sizes["bfloat16"] < 0.75 * sizes["float32"]
    loaded = made(FAMILIES["llama"], tiny_tokenizer)
    loaded.model.lm_head.weight.data[3, 3] = 1e5
    with pytest.raises(ModelError, match=r"float16 cannot hold the weights: lm_head.weight"):
        write_gguf(loaded, tmp_path / "model.gguf", name="mine", dtype="float16")


def test_without_a_wish_the_precision_is_that_of_the_folder(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    loaded = made(FAMILIES["llama"], tiny_tokenizer)
    loaded = LoadedModel(loaded.model, tiny_tokenizer, "made", {"config.json": b'{"dtype": "bfloat16"}'}, ())
    assert write_gguf(loaded, tmp_path / "model.gguf", name="mine") == "bfloat16"


def test_the_tokenizer_and_the_settings_are_in_the_file(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    write_gguf(made(FAMILIES["llama"], tiny_tokenizer), tmp_path / "model.gguf", name="mine")
    reader, vocabulary = GGUFReader(tmp_path / "model.gguf"), tiny_tokenizer.get_vocab()
    tokens, types = (value_of(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert len(tokens) == len(types) == ENDS["vocab_size"] > len(vocabulary)
    assert all(tokens[token_id] == token for token, token_id in vocabulary.items())
    control = {tokens[n] for n, kind in enumerate(types) if kind == 3}
    assert control == set(tiny_tokenizer.all_special_tokens) | {"<|im_start|>", "<|im_end|>"}
    assert types[-1] == 5 and tokens[-1] == "[PAD303]"
    assert {
        key: value_of(reader, key) for key in ("general.name", "general.architecture", "llama.rope.freq_base")
    } == {
        "general.name": "mine",
        "general.architecture": "llama",
        "llama.rope.freq_base": 5000.0,
    }
    assert value_of(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert value_of(reader, "tokenizer.chat_template") == tiny_tokenizer.chat_template
    assert value_of(reader, "tokenizer.ggml.eos_token_id") == tiny_tokenizer.eos_token_id
    assert value_of(reader, "tokenizer.ggml.add_bos_token") is False


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLIC: dict[str, list[PreTokenizer]] = {
    "gpt-2": [ByteLevel(add_prefix_space=False)],
    "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
    "qwen2": [
        Split(Regex(WORDS + r"\p{N}" + REST), "isolated"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "llama-bpe": [
        Split(Regex(WORDS + r"\p{N}{1,3}" + REST), "isolated"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
UNKNOWN: dict[str, list[PreTokenizer]] = {
    "another expression": [Split(Regex(r"\p{N}"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
    "a space before": [ByteLevel(add_prefix_space=True)],
    "digits together": [Digits(individual_digits=False), ByteLevel(add_prefix_space=False)],
    "removed": [
        Split(Regex(WORDS + r"\p{N}" + REST), "removed"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def cut_by(steps: list[PreTokenizer]) -> PreTrainedTokenizerFast:
    """A tokenizer whose model is nearly empty: its pre-tokenizer is what counts."""
    letters = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize("name", PUBLIC)
def test_how_a_text_is_cut_has_the_name_that_others_know(name: str, tmp_path: Path):
    write_gguf(made(FAMILIES["llama"], cut_by(PUBLIC[name])), tmp_path / "model.gguf", name="mine")
    assert value_of(GGUFReader(tmp_path / "model.gguf"), "tokenizer.ggml.pre") == name


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tokenizer_that_others_would_read_as_another_is_refused(name: str, tmp_path: Path):
    with pytest.raises(ModelError, match=r"The tokenizer of this model .* is not written as GGUF here"):
        write_gguf(made(FAMILIES["llama"], cut_by(UNKNOWN[name])), tmp_path / "model.gguf", name="mine")


def test_what_is_silent_for_this_thread_is_not_for_the_display_of_another(monkeypatch: pytest.MonkeyPatch):
    there = io.StringIO()
    monkeypatch.setattr(sys, "stderr", there)
    with silent_here():
        sys.stderr.write("the bar of a library")
        drawing = threading.Thread(target=lambda: sys.stderr.write("the picture of the export"))
        drawing.start()
        drawing.join()
    sys.stderr.write(", and this")
    assert there.getvalue() == "the picture of the export, and this"
