"""LoRA adapters, made by `peft` inside a model: W x + (alpha / rank) B A x, with W frozen.

A is drawn from the run's seed and B is zero. So every client starts with the same adapters, and the model computes
the same function as the base model. Source: Hu et al., LoRA, 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parablock.errors import ModelError
from parablock.model.blocks import Block, find_layers
from parablock.seeding import generator_for

LoraLayer = Any
"""`peft.tuners.lora.LoraLayer`; peft is an extra."""
ADAPTER = "default"


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] = (),
    layers_path: str | None = None,
    seed: int,
) -> None:
    """Add adapters to weight matrices of the decoder layers, in place.

    `rank` counts the rows of A and the columns of B, and the scale of an adapter is alpha / rank. `target_modules`
    are last parts of module names, such as `q_proj`; without any, every matrix of the layers gets an adapter.

    Raises:
        ModelError: `peft` is not installed, or as `check_rank`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ModelError(
            "LoRA needs the package peft, which is not installed",
            remedy="Install it: pip install 'parablock[lora]'",
        ) from None
    names = check_rank(model, rank=rank, target_modules=target_modules, layers_path=layers_path)
    with torch.random.fork_rng(devices=[]):  # the draws of peft are replaced below
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none"), model
        )
    for index, (_, layer) in enumerate(adapted_layers(model)):
        layer.lora_A[ADAPTER].weight.data.copy_(draw_a(layer.lora_A[ADAPTER].weight, seed, index))
        layer.lora_B[ADAPTER].weight.data.zero_()


def check_rank(
    model: PreTrainedModel, *, rank: int, target_modules: Sequence[str] = (), layers_path: str | None = None
) -> list[str]:
    """Return the names of the matrices that get adapters; the model may be an outline, and nothing is allocated.

    Raises:
        ModelError: The model has no module of such a name, or `rank` is above that of every matrix, which is at
            most its smaller side: more columns of B and rows of A could not change what the product can be.
    """
    path, _ = find_layers(model, layers_path)
    names = _find_targets(model, path, target_modules)
    most = max(min(model.get_parameter(f"{name}.weight").shape) for name in names)
    if rank > most:
        raise ModelError(
            f"lora.rank is {rank}, and no matrix that gets an adapter has a rank above {most}",
            cause="A matrix has at most the rank of its smaller side; more of it is sent for nothing.",
            remedy=f"Set lora.rank to at most {most}; 8 to 64 is usual.",
        )
    return names


def draw_a(like: Tensor, seed: int, *indices: int) -> Tensor:
    """Draw A as LoRA does: uniform, within ± 1 / √inputs."""
    bound = like.shape[1] ** -0.5
    drawn = generator_for(seed, "lora A", *indices).uniform(-bound, bound, size=tuple(like.shape))
    return torch.from_numpy(drawn).to(like.dtype)


def adapter_block(
    model: PreTrainedModel,
    *,
    index: int = 0,
    matrices: Sequence[str] = ("A", "B"),
    layers_path: str | None = None,
) -> Block:
    """Return one block of the adapters' parameters, module after module: A, B or both of each adapter."""
    names = [f"{name}.lora_{letter}.{ADAPTER}.weight" for name, _ in adapted_layers(model) for letter in matrices]
    return _make_block(f"adapters, {' and '.join(matrices)}", names, model, layers_path, index)


def matrices_block(model: PreTrainedModel, *, layers_path: str | None = None) -> Block:
    """Return one block of the matrices that have adapters, in the same order; see `adapter_block`."""
    names = [f"{name}.base_layer.weight" for name, _ in adapted_layers(model)]
    return _make_block("matrices with adapters", names, model, layers_path)


def draw_adapters(model: PreTrainedModel, *, seed: int, round_index: int, client_id: int) -> Tensor:
    """Draw a FLoRA client's adapters for a round: A as in LoRA, B zero; flat, in the layout of `Factors`."""
    pieces = []
    for index, (_, layer) in enumerate(adapted_layers(model)):
        drawn = draw_a(layer.lora_A[ADAPTER].weight, seed, round_index, client_id, index)
        pieces += [drawn.reshape(-1), torch.zeros_like(layer.lora_B[ADAPTER].weight).reshape(-1).cpu()]
    return torch.cat(pieces)


def adapted_layers(model: PreTrainedModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the names and modules that have an adapter, in the model's order."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter to its matrix and remove the adapter; a model without adapters stays as it is."""
    for name, layer in list(adapted_layers(model)):
        base = layer.get_base_layer()
        with torch.no_grad():
            base.weight.add_(layer.get_delta_weight(ADAPTER).to(base.weight.dtype))
        model.set_submodule(name, base)
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(mark, None)


def _make_block(
    name: str, names: Sequence[str], model: PreTrainedModel, layers_path: str | None, index: int = 0
) -> Block:
    """Return one block, over all layers, of the named parameters."""
    layers_path, layers = find_layers(model, layers_path)
    size = sum(model.get_parameter(name).numel() for name in names)
    return Block(index, name, tuple(range(len(layers))), tuple(names), size, layers_path=layers_path)


def _find_targets(model: PreTrainedModel, layers_path: str, wanted: Sequence[str]) -> list[str]:
    matrices = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{layers_path}.") and isinstance(module, nn.Linear | Conv1D)
    ]
    missing = [end for end in wanted if not any(name.endswith(f".{end}") for name in matrices)]
    if missing or not matrices:
        ends = sorted({name.rpartition(".")[2] for name in matrices})
        raise ModelError(
            f"lora.target_modules: no weight matrix of the decoder layers is called {', '.join(missing) or '…'}",
            cause=f"This architecture has {', '.join(ends) or 'none'}.",
            remedy="Name some of these, or leave target_modules empty for all of them.",
        )
    return [name for name in matrices if not wanted or any(name.endswith(f".{end}") for end in wanted)]
