"""TODO parablock.methods.choose."""

from __future__ import annotations

from collections.abc import Sequence

from parablock.config.methods import SOLO_METHODS
from parablock.methods.base import MethodModel, RunInputs
from parablock.methods.flora import FloraModel
from parablock.methods.solo import SoloModels


def make_method_model(job: RunInputs, clients: Sequence[int] | None = None) -> MethodModel:
    """Make the fleet that the configured method asks for; see `MethodModel`."""
    method = job.config.federation.method
    if method in SOLO_METHODS:
        return SoloModels(job)
    return FloraModel(job, clients) if method == "flora" else MethodModel(job, clients)
