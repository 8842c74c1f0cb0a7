"""The outline of a model: its architecture with the shapes of all parameters, and no values.

It is made from config.json alone, on torch's `meta` device, so that a model of any size has an outline
within a second and without memory.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from parablock.model.load import DTYPES, find_source, read_config, reading, unreadable


def outline_model(name_or_path: str, *, dtype: str) -> PreTrainedModel:
    """Make a causal language model without values.

    Args:
        name_or_path: A folder that holds config.json, or a Hugging Face id.
        dtype: Precision of the parameters, `float32` or `bfloat16`.

    Returns:
        The model on the `meta` device: its parameters have names, shapes and ties, and no memory.

    Raises:
        ModelError: For a folder or id whose configuration cannot be read, or is not that of a causal
            language model.
    """
    source = find_source(name_or_path)
    with reading(source):
        config = read_config(source)
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        except Exception as error:
            raise unreadable(source, "architecture", error) from error
