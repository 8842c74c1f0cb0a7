"""Run the in-process engine and make plans in the few words that tests need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from parablock.engine.contract import EngineInput, EngineResult, Masking
from parablock.engine.faults import NO_FAULTS, Faults
from parablock.engine.inprocess import run_in_process
from parablock.engine.plans import ClientPlan, Hooks, ServerPlan
from parablock.privacy.protection import Protection
from parablock.storage.checkpoint import RunState
from parablock.trace import Trace
from parablock.training.trainer import Trainer
from parablock.wire.transport import Link


def engine_input(
    params: Sequence[Tensor],
    trainers: Sequence[Trainer],
    plan: ServerPlan,
    trace: Trace,
    hooks: Hooks,
    *,
    link: Link = Link(),  # noqa: B008
    in_flight: str = "aligned",
    resumed: RunState | None = None,
    faults: Faults = NO_FAULTS,
    protection_of: Callable[[int], Protection | None] = lambda _: None,
    masking: Masking | None = None,
) -> EngineInput:
    client = ClientPlan(in_flight, plan.form, protection_of)
    return EngineInput(plan, client, lambda: params, trainers, trace, hooks, link, resumed, faults, masking)


def run_here(
    params: Sequence[Tensor],
    trainers: Sequence[Trainer],
    plan: ServerPlan,
    trace: Trace,
    hooks: Hooks,
    **options: object,
) -> EngineResult:
    return run_in_process(engine_input(params, trainers, plan, trace, hooks, **options))
