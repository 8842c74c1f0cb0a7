"""Run the in-process engine and make plans in the few words that tests need."""

from __future__ import annotations

from parablock.engine.contract import EngineInput, EngineResult
from parablock.engine.inprocess import run_in_process
from parablock.engine.local_steps import FixedSteps
from parablock.engine.plans import ClientPlan, Hooks, ServerPlan
from parablock.engine.update_form import Differences, UpdateForm
from parablock.trace import Trace
from parablock.wire.quantize import Encoding

QUIET = Hooks(on_commit=lambda *_: None, on_checkpoint=lambda _: None)
"""Nobody who listens."""


def server_plan(
    num_clients: int, num_rounds: int, delay: int, form: UpdateForm | None = None, **changes
) -> ServerPlan:
    """Make a `ServerPlan` of one local step a round and fp32 differences, but for what is changed."""
    usual = {"schedule": "shuffled", "participation": 1.0, "seed": 0, "local_steps": FixedSteps(1)}
    usual |= {"form": form or Differences(Encoding("float32")), "stall_timeout_s": 20.0, "checkpoint_every": 0}
    return ServerPlan(num_clients, num_rounds, delay, **{**usual, **changes})


def engine_input(
    params,
    trainers,
    plan: ServerPlan,
    trace: Trace,
    hooks: Hooks = QUIET,
    *,
    in_flight: str = "aligned",
    protection_of=lambda _: None,
    **further,
) -> EngineInput:
    """What an engine is given; `further` are fields of `EngineInput`."""
    client = ClientPlan(in_flight, plan.form, protection_of)
    return EngineInput(plan, client, lambda: params, trainers, trace, hooks, **further)


def run_here(params, trainers, plan: ServerPlan, trace: Trace, hooks: Hooks = QUIET, **options) -> EngineResult:
    """Run in this process; the options are those of `engine_input`."""
    return run_in_process(engine_input(params, trainers, plan, trace, hooks, **options))
