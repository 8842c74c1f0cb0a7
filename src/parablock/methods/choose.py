"""The choice of the class that keeps a method's model and makes its local training, by the method's traits."""

from __future__ import annotations

from collections.abc import Sequence

from parablock.methods.base import MethodModel, RunInputs
from parablock.methods.flora import FloraModel
from parablock.methods.solo import SoloModels


def make_method_model(job: RunInputs, clients: Sequence[int] | None = None) -> MethodModel:
    """Make the model that the configured method asks for; see `MethodModel`."""
    match job.config.federation.traits.combines:
        case "nothing":
            return SoloModels(job)
        case "stack":
            return FloraModel(job, clients)
        case "mean":
            return MethodModel(job, clients)
