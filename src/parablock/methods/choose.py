"""The choice of a method's model class, by the method's traits."""

from __future__ import annotations

from collections.abc import Sequence

from parablock.methods.base import UNWATCHED, MethodModel, RunInputs, Watch
from parablock.methods.flora import FloraModel
from parablock.methods.solo import SoloModels


def make_method_model(
    inputs: RunInputs, clients: Sequence[int] | None = None, watch: Watch = UNWATCHED
) -> MethodModel:
    """Make the model of the configured method; see `MethodModel`."""
    match inputs.config.federation.traits.combines:
        case "nothing":
            return SoloModels(inputs, watch)
        case "stack":
            return FloraModel(inputs, clients, watch)
        case "mean":
            return MethodModel(inputs, clients, watch)
