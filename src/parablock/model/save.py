"""Hugging Face checkpoints: write one and read it back, and hash weights to compare two."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from parablock.errors import ModelError, StorageError, reading
from parablock.model.portable import base_dtype, make_portable
from parablock.model.pretrained import quiet_transformers

_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Entries of a configuration that say where it comes from, or what the weights say themselves."""


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path | str,
    *,
    kept_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a Hugging Face checkpoint: safetensors, configuration, tokenizer; read it back, and compare.

    The files are written beside `directory` and renamed when they are on the disk and read back as the same model;
    an earlier `directory` is replaced. The model is not changed; it may be a `Replica`'s, whose parameters share
    storage.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        directory: A folder.
        kept_files: The files of the base that the export keeps, by name. The weights get the base's precision, if
            its config.json names one that can hold them; otherwise that of the model.

    Raises:
        StorageError: The folder cannot be written: the disk is full or read-only, or a file has its name.
        ModelError: What was written does not read back as the same model.
    """
    directory, kept_files = Path(directory), kept_files or {}
    partial = directory.with_name(f".{directory.name}.partial")
    previous = directory.with_name(f".{directory.name}.previous")
    kept = model.generation_config
    try:
        if directory.exists() and not directory.is_dir():
            raise FileExistsError(f"{directory} is a file")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with quiet_transformers():
            model.generation_config = _valid_generation_config(kept)
            weights = _weights(model, base_dtype(kept_files))
            # this separates shared storage, and writes tied weights once
            model.save_pretrained(partial, state_dict=dict(weights))
            tokenizer.save_pretrained(partial)
            dtype = next(iter(weights.values())).dtype
            make_portable(partial, kept_files, dtype=str(dtype).removeprefix("torch."))
            _compare(partial, model, weights, tokenizer, directory)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        shutil.rmtree(previous, ignore_errors=True)
        if directory.exists():
            directory.rename(previous)
        partial.rename(directory)
        _sync(directory.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"The model cannot be written to {directory}: {' '.join(str(error).split())}",
            cause="The disk is full or read-only, or the path is not a folder.",
            remedy="Free some space, or choose another place; no incomplete files were left there. A run goes on "
            "from its last checkpoint with `parablock resume`.",
        ) from error
    finally:
        model.generation_config = kept
        shutil.rmtree(partial, ignore_errors=True)


def _weights(model: PreTrainedModel, dtype: str | None) -> dict[str, Tensor]:
    """Return the model's tensors in a precision that can hold them, tied ones once."""
    state = dict(model.state_dict())
    wanted = model.dtype if dtype is None else getattr(torch, dtype)
    if wanted == model.dtype:
        return state
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in state.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast:
            cast[key] = tensor.to(wanted) if tensor.is_floating_point() else tensor
            if not torch.isfinite(cast[key]).all():
                return state
    return {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


def _compare(
    folder: Path,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Read a written model as anybody would, and compare it with what was to be written.

    Raises:
        ModelError: It is another one.
    """
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    state = again.state_dict()
    different = [
        name
        for name, tensor in weights.items()
        if name not in state or state[name].dtype != tensor.dtype or not torch.equal(state[name], tensor.cpu())
    ]
    if not different and not _computes_the_same(again, model, weights):
        different.append("what config.json makes of the weights")
    read, probe = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), "Ann has 12 apples.\n#### 12 → é"
    if len(read) != len(tokenizer) or read(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        different.append("the tokenizer")
    if read.chat_template != tokenizer.chat_template:
        different.append("the chat template")
    if different:
        raise ModelError(
            f"The model written for {directory} does not read back as the one that was trained: "
            f"{different[0]} differs",
            cause="Transformers reads these files in another way than it writes them; nothing was left there.",
            remedy="Report it with the name of the base model; `parablock resume` can write the model again.",
        )


def _computes_the_same(again: PreTrainedModel, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> bool:
    """Return whether the model that was read computes what the trained one does with the written weights."""
    if _settings(again.config.to_dict()) == _settings(model.config.to_dict()):
        return True
    ids = torch.arange(2, 34, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    on_device = {name: tensor.to(model.device) for name, tensor in weights.items()}
    with torch.no_grad():
        wanted = functional_call(model, on_device, (ids,), {"use_cache": False}).logits
        found = again.to(model.device)(ids, use_cache=False).logits
    return torch.allclose(found.float(), wanted.float(), atol=1e-4)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of the computation, without noise in training, precision and versions."""
    names = ("dtype", "torch_dtype", "transformers_version", "architectures")
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not (name in names or str(name).startswith("_") or "drop" in str(name) or "jitter" in str(name))
    }


def model_sha256(directory: Path | str) -> str:
    """Hash the tensors of a checkpoint: 64 hexadecimal digits.

    Names, dtypes, shapes and values count; metadata, and the distribution of tensors over files, have no effect.

    Raises:
        ModelError: The folder has no safetensors, or one cannot be read.
    """
    directory = Path(directory)
    digest = hashlib.sha256()
    try:
        files = {}
        for path in sorted(directory.glob("*.safetensors")):
            with reading(path, ModelError):  # in the system's words; those of the library would be others
                path.open("rb").close()
            with safe_open(path, framework="pt") as tensors:
                files.update(dict.fromkeys(tensors.keys(), path))
        for name in sorted(files):
            with safe_open(files[name], framework="pt") as tensors:
                _hash_tensor(digest, name, tensors.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"The weights in {directory} cannot be read: {' '.join(str(error).split())}",
            cause="A file was cut or changed, or is no file of safetensors.",
            remedy="Put back a copy of it.",
        ) from error
    if not files:
        raise ModelError(f"There are no *.safetensors in {directory}", remedy="Give the folder of a saved model.")
    return digest.hexdigest()


def base_parts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hash what a base model in memory consists of: weights (tied ones once), config, tokenizer, chat template.

    Everything that changes what a row becomes, or what the model makes of it, is in one of them; versions of
    libraries and the names of folders are in none.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        _hash_tensor(weights, name, tensor.detach().cpu())
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_OF_THE_MODEL}
    return {
        "weights": weights.hexdigest(),
        "config": _hash_plain(config),
        "tokenizer": _hash_plain(_content(tokenizer)),
        "chat_template": _hash_plain(tokenizer.chat_template),
    }


def base_sha256(parts: Mapping[str, str]) -> str:
    """Return one hash of what `base_parts` has hashed."""
    return _hash_plain(dict(parts))


def different_parts(own: Mapping[str, str], others: Mapping[str, str]) -> str:
    """Return in words which parts of two base models differ, each with the beginnings of its hashes."""
    differing = [part for part, hash_ in own.items() if others.get(part) != hash_]
    pairs = (
        f"the {part.replace('_', ' ')} ({own[part][:12]}, and {others.get(part, '')[:12]})" for part in differing
    )
    return f"{', '.join(pairs)} differ{'s' * (len(differing) == 1)}"


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = (
        {"vocabulary": sorted(tokenizer.get_vocab().items())} if backend is None else json.loads(backend.to_str())
    )
    for changes_with_its_use in ("truncation", "padding"):
        content.pop(changes_with_its_use, None)
    return content | {"special": {key: str(token) for key, token in tokenizer.special_tokens_map.items()}}


def _hash_plain(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _valid_generation_config(config: GenerationConfig) -> GenerationConfig:
    try:
        config.validate(strict=True)
    except ValueError:  # such as a temperature without do_sample; Transformers refuses to save it
        return GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
    return config
