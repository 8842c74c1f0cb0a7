"""Hugging Face checkpoints: write one, and hash weights to compare two."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from parablock.errors import ModelError, StorageError
from parablock.model.pretrained import quiet_transformers


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path | str) -> None:
    """Write a Hugging Face checkpoint: safetensors, configuration, tokenizer.

    The files are written beside `directory` and renamed when they are complete; an earlier `directory` is
    replaced. The model is not changed; it may be a `Replica`'s, whose parameters share storage.

    Raises:
        StorageError: The folder cannot be written: the disk is full or read-only, or a file has its name.
    """
    directory = Path(directory)
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
            model.save_pretrained(partial)  # separates shared storage, and writes tied weights once
            tokenizer.save_pretrained(partial)
        shutil.rmtree(previous, ignore_errors=True)
        if directory.exists():
            directory.rename(previous)
        partial.rename(directory)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"The model cannot be written to {directory}: {error}",
            cause="The disk is full or read-only, or the path is not a folder.",
            remedy="Free some space or give another output directory; no incomplete files were left there.",
        ) from error
    finally:
        model.generation_config = kept
        shutil.rmtree(partial, ignore_errors=True)


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
            with safe_open(path, framework="pt") as tensors:
                files.update(dict.fromkeys(tensors.keys(), path))
        for name in sorted(files):
            with safe_open(files[name], framework="pt") as tensors:
                _hash_tensor(digest, name, tensors.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The weights in {directory} cannot be read: {error}") from error
    if not files:
        raise ModelError(f"There are no *.safetensors in {directory}", remedy="Give the folder of a saved model.")
    return digest.hexdigest()


def base_sha256(model: PreTrainedModel) -> str:
    """Hash the weights of a model in memory, tied weights once: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        _hash_tensor(digest, name, tensor.detach().cpu())
    return digest.hexdigest()


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _valid_generation_config(config: GenerationConfig) -> GenerationConfig:
    try:
        config.validate(strict=True)
    except ValueError:  # such as a temperature without do_sample; Transformers refuses to save it
        return GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
    return config
