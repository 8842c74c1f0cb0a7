"""Rows as tokens, and models to answer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from parablock.data.prompts import Tokenized, tokenize_rows
from parablock.data.sources import Row


def tokenized(
    rows: Sequence[Row], tokenizer: Any, data_format: str = "auto", max_length: int = 512, **options: Any
) -> Tokenized:
    options = {"completion_only_loss": True} | options
    return tokenize_rows(rows, tokenizer, data_format=data_format, max_length=max_length, **options)


def stirred(model: Any, *, seed: int = 0) -> Any:
    """Add noise to all weights: a model of the usual initialisation only repeats its last token."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model
