"""The longest text that a model can read, and what happens beyond it.

Learned positions end: the model has no row for a later token. Rotary ones go on to where nothing was learnt.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from parablock.errors import ModelError

_NAME = re.compile(r"(^|[._])(wpe|pos\w*|embed_positions)($|[._])")


def check_length(model: PreTrainedModel, max_length: int) -> list[str]:
    """Refuse examples that are longer than a table of positions; return a warning where they leave what was learnt.

    Args:
        model: The model, or its outline.
        max_length: `data.max_length`, in tokens.

    Raises:
        ModelError: The model has learned positions, and fewer than `max_length`.
    """
    learned = _learned_positions(model)
    if learned is not None and max_length > learned:
        raise ModelError(
            f"data.max_length is {max_length}, and {model.config.model_type} has {learned} positions",
            cause="Its positions are a table that was learnt with the model; there is no row for a later token.",
            remedy=f"Set data.max_length: {learned}, or less.",
        )
    text = model.config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    if learned is None and isinstance(known, int) and max_length > known:
        return [
            f"warning: data.max_length is {max_length}, and the model was trained on texts of up to {known} "
            f"tokens; it has not learnt what lies beyond. Set data.max_length: {known}, or less"
        ]
    return []


def _learned_positions(model: PreTrainedModel) -> int | None:
    """Return the rows of the table of positions, without those that no token uses; None if there is no table."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _NAME.search(name) and module is not model.get_input_embeddings():
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None
