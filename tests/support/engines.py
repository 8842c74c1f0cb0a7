"""Run the in-process engine and make plans in the few words that tests need."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parablock.engine.contract import EngineInput, EngineResult
from parablock.engine.inprocess import run_in_process
from parablock.engine.local_steps import FixedSteps
from parablock.engine.plans import ClientPlan, Hooks, ServerPlan
from parablock.engine.update_form import Differences, UpdateForm
from parablock.trace import Trace
from parablock.wire.quantize import Encoding
from parablock.wire.transport import Traffic

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
    asked = 1 if plan.in_turn else max(1, round(plan.participation * plan.num_clients))
    client = ClientPlan(in_flight, plan.form, plan.delay + 1, protection_of, asked)
    return EngineInput(plan, client, lambda: params, trainers, trace, hooks, **further)


def run_here(params, trainers, plan: ServerPlan, trace: Trace, hooks: Hooks = QUIET, **options) -> EngineResult:
    """Run in this process; the options are those of `engine_input`."""
    return run_in_process(engine_input(params, trainers, plan, trace, hooks, **options))


@dataclass
class Followed:
    """A run, and what it told: parameters, whose updates counted and bytes at each commit, and its events."""

    result: EngineResult
    seconds: float
    trajectory: list[tuple[Tensor, ...]]
    counted: list[list[int]]
    traffic: list[Traffic]
    events: list[str]


def follow(params, trainers, plan: ServerPlan, trace: Trace, **options) -> Followed:
    """Run in this process as `run_here` does, and listen."""
    trajectory, counted, bytes_of, events = [], [], [], []

    def on_commit(state, updates, traffic) -> None:
        trajectory.append(state.params)
        counted.append([update.client_id for update in updates])
        bytes_of.append(traffic)

    hooks = Hooks(on_commit, lambda _: None, on_event=events.append)
    result = run_here(params, trainers, plan, trace, hooks, **options)
    return Followed(result, trace.clock.now(), trajectory, counted, bytes_of, events)
