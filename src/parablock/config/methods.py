"""TODO parablock.config.methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Method = Literal[
    "parablock",
    "fl_bcd",
    "fedavg",
    "fedit",
    "ffa_lora",
    "flora",
    "fedcybgd",
    "fedprox",
    "local",
    "central",
]


BLOCK_METHODS = ("parablock", "fl_bcd", "fedcybgd")
"""Those that train one block at a time; to the others the section `blocks` says nothing."""


LORA_METHODS = ("fedit", "ffa_lora", "flora")
"""Those that train adapters, which are merged into the model at the end."""


SOLO_METHODS = ("local", "central")
"""Those whose clients send nothing and keep a model each."""


def cohort_size(federation: Mapping[str, Any]) -> int:
    """Tell how many clients are asked in a round."""
    return max(1, round(float(federation["participation"]) * int(federation["num_clients"])))
