"""GGUF: weights, settings and tokenizer of a model in one file, which llama.cpp and what is built on it read.

Four families are written here; others are refused by name. A file is read back by Transformers, and compared,
before it gets its name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from parablock.errors import ModelError
from parablock.model.gguf_tokenizer import add_tokenizer
from parablock.model.portable import base_dtype
from parablock.model.pretrained import LoadedModel, quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Types of models that can be written → their names in GGUF."""

GgufDtype = Literal["float32", "float16", "bfloat16"]

_PERMUTED = ("llama",)
"""Architectures in which the two halves of a rotated head lie interleaved, as in the first LLaMA."""


def write_gguf(loaded: LoadedModel, path: Path, *, name: str, dtype: GgufDtype | None = None) -> GgufDtype:
    """Write a model with its tokenizer, read it back, and compare.

    Args:
        loaded: The model in float32 on the CPU; its matrices are rounded to the precision of the file.
        path: A file in a folder that is there.
        name: What the model calls itself.
        dtype: The precision of matrices; None: that of the model's config.json, or float32. Vectors are float32.

    Returns:
        The precision of matrices.

    Raises:
        ModelError: The package gguf is missing, the model or its tokenizer cannot be written as GGUF, the precision
            cannot hold a weight, or the file reads back as another model.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ModelError(
            "GGUF needs the package gguf, which is not installed",
            remedy="Install it: pip install 'parablock[gguf]'",
        ) from None
    model, config = loaded.model, loaded.model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"A model of type {config.model_type} is not written as GGUF here",
            cause=f"The types that are, and that are read back to compare, are {', '.join(ARCHITECTURES)}.",
            remedy="Export it with --format hf, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    precision: Any = dtype or base_dtype(loaded.kept_files) or "float32"
    _round(model, getattr(torch, precision))
    writer = GGUFWriter(path, architecture)
    writer.add_name(name)
    _add_settings(writer, config)
    add_tokenizer(writer, loaded.tokenizer, model.get_input_embeddings().weight.shape[0])
    _add_tensors(writer, model, architecture, precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare(path, model)
    return precision  # type: ignore[no-any-return]


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round matrices to a precision, in place."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.to(dtype).float())
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{str(dtype).removeprefix('torch.')} cannot hold the weights: {name} has a larger one",
                remedy="Export with --dtype float32 or bfloat16.",
            )


def _add_settings(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"The rotary positions are stretched ({rope['rope_type']}), which is not written as GGUF here",
            cause="Transformers does not read such a file back, so it could not be compared.",
            remedy="Export it with --format hf, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]  # without types they are all alike
    if window is not None and window < config.max_position_embeddings and "sliding_attention" in layers:
        raise ModelError(
            f"Attention is limited to a sliding window of {window} tokens, which is not written as GGUF here",
            cause="What reads the file would let every token attend to all that precede it.",
            remedy="Export it with --format hf, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tensors(writer: GGUFWriter, model: PreTrainedModel, architecture: str, dtype: GgufDtype) -> None:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, LlamaFileType, get_tensor_name_map
    from gguf.quants import quantize

    file_types = {
        "float32": (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
        "float16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
        "bfloat16": (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
    }
    file_type, stored = file_types[dtype]
    writer.add_file_type(file_type)
    (arch,) = (arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == architecture)
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a tied head is the embeddings
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ModelError(
                f"GGUF has no name for the tensor {name} of a model of type {model.config.model_type}",
                remedy="Export it with --format hf.",
            )
        values = _as_stored(parameter.detach(), written, model.config, architecture).numpy()
        if parameter.ndim == 1:
            writer.add_tensor(written, values)
        else:
            writer.add_tensor(written, quantize(values, stored), raw_dtype=stored)


def _as_stored(tensor: Tensor, written: str, config: PreTrainedConfig, architecture: str) -> Tensor:
    """Return a tensor with the rows of rotated heads in the order that GGUF has."""
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for part, num_heads in heads.items():
        if part in written and architecture in _PERMUTED:
            halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
    return tensor.contiguous()


_IS_SILENT: ContextVar[bool] = ContextVar("is_silent", default=False)
"""Whether what is written to standard error is dropped; each thread has its own."""


class _UnlessSilent:
    """A stream that drops what a silent thread writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _IS_SILENT.get() else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def silent_here() -> Iterator[None]:
    """Drop what this thread writes to standard error: the bar of Transformers has no switch, and ours goes on."""
    before = _IS_SILENT.set(True)
    try:
        with redirect_stderr(cast(TextIO, _UnlessSilent(sys.stderr))):
            yield
    finally:
        _IS_SILENT.reset(before)


@torch.no_grad()
def _compare(path: Path, model: PreTrainedModel) -> None:
    """Read a written file as Transformers does, and compare every weight, and the logits of a text.

    Raises:
        ModelError: It is another model.
    """
    try:
        with quiet_transformers(), silent_here():
            again = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:
        raise _other_model(" ".join(str(error).split())[:300]) from error
    read = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in read or not torch.equal(read[name], parameter):
            raise _other_model(f"{name} differs")
    ids = torch.arange(2, 66)[None] % model.get_input_embeddings().weight.shape[0]
    if not torch.allclose(again(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5):
        raise _other_model("the weights are the same, and what the settings make of them differs")


def _other_model(difference: str) -> ModelError:
    return ModelError(
        f"The GGUF file does not read back as the model that was written: {difference}",
        cause="GGUF, or its reader in Transformers, has no place for something in the configuration of this model.",
        remedy="Export it with --format hf, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
    )
