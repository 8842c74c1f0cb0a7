"""What `deployed.py` deploys: the real engine, courier, mailbox and stream, with training that only takes time."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

SETTINGS = "PARABLOCK_FLOWER_BENCHMARK"


def settings() -> tuple[dict[str, Any], int, Any]:
    """Read what the benchmark wants measured, with the elements of a block and how they are sent."""
    import torch

    from parablock.wire.quantize import Encoding

    torch.set_num_threads(1)  # as a run does
    wanted: dict[str, Any] = json.loads(os.environ[SETTINGS])
    encoding = Encoding("float32", chunk_bytes=wanted["chunk_mib"] << 20)
    return wanted, max(1, int(wanted["megabytes"] * 1e6 / 4)), encoding


def serve(grid: Any, context: Any) -> None:
    """Run the rounds and write how long each took."""
    import torch

    from parablock.clock import RealClock
    from parablock.engine.contract import EngineInput
    from parablock.engine.flower.engine import run_over_flower
    from parablock.engine.flower.exchange import Request
    from parablock.engine.flower.grid import GridTransport
    from parablock.engine.local_steps import FixedSteps
    from parablock.engine.plans import ClientPlan, Hooks, ServerPlan
    from parablock.engine.update_form import Differences
    from parablock.trace import Trace

    wanted, elements, encoding = settings()
    sites, rounds, delay = wanted["sites"], wanted["rounds"], wanted["delay"]
    form = Differences(encoding)
    plan = ServerPlan(sites, rounds, delay, "cyclic", 1.0, 0, form, FixedSteps(1), 900.0, 0)
    opening = Request("benchmark", str(context.run_id), None, "", "")
    transport = GridTransport(grid, sites, opening, epoch_s=time.time, tell=print)
    transport.gather(300.0)
    trace, commits = Trace(RealClock()), list[float]()
    hooks = Hooks(on_commit=lambda *_: commits.append(trace.clock.now()), on_checkpoint=lambda _: None)
    client = ClientPlan("aligned", form)

    def take_params() -> list[Any]:
        return [torch.zeros(elements) for _ in range(wanted["blocks"])]

    run_over_flower(EngineInput(plan, client, take_params, (), trace, hooks), transport)
    spans = [[s.client_id, s.activity, s.start_s, s.duration_s, dict(s.facts)] for s in trace.spans]
    found = {"commits": commits, "spans": spans, "epoch_s": time.time() - trace.clock.now()}
    beside = Path(wanted["output"] + ".partial")
    beside.write_text(json.dumps(found))
    beside.rename(wanted["output"])


def train(client_id: int, state_dir: Path, session: Path) -> None:
    """Be the trainer of a site: every round takes the seconds that the benchmark says."""
    import torch

    from parablock.algorithm.parablock import initial_client
    from parablock.clock import RealClock
    from parablock.engine.client import Client
    from parablock.engine.flower.local_socket import address_of, listen, secret_of
    from parablock.engine.flower.mailbox import TrainerMailbox
    from parablock.engine.flower.session import SessionFolder
    from parablock.engine.plans import ClientPlan, ClientStart
    from parablock.engine.update_form import Differences
    from parablock.trace import Trace
    from parablock.training.trainer import Trained

    wanted, elements, encoding = settings()
    # numbers that differ: Flower stores and sends what is alike only once
    noise = torch.randn(elements, generator=torch.Generator().manual_seed(client_id))

    class Sleeper:
        num_examples, step_time_s = 1, None

        def train(self, _: int, block_index: int, *rest: Any) -> Trained:
            time.sleep(wanted["compute_s"])
            return Trained(rest[-1][block_index] + noise, 0.0)

        def memory(self) -> dict[str, Any]:
            return {}

        def remember(self, memory: dict[str, Any]) -> None:
            assert not memory

    trace = Trace(RealClock())
    mailbox = TrainerMailbox(
        client_id,
        listen(address_of(state_dir)),
        secret_of(state_dir),
        SessionFolder(state_dir, session.parent.name, session.name.removeprefix("session-")),
        trace,
        epoch_s=time.time() - trace.clock.now(),
        lease_s=600.0,
    )
    state = initial_client(tuple(torch.zeros(elements) for _ in range(wanted["blocks"])))
    plan = ClientPlan("aligned", Differences(encoding))
    with mailbox:
        Client(client_id, plan, Sleeper(), nullcontext(mailbox), trace, start=ClientStart(state), warn=print).run()


def _site_of(context: Any) -> tuple[int, Path, list[str]]:
    state_dir, client_id = Path(str(context.node_config["state"])), int(context.node_config["client-id"])
    return client_id, state_dir, [sys.executable, __file__, str(client_id), str(state_dir)]


def _client() -> Any:
    """Make the ClientApp, which notes when it had the request, and when it had the reply."""
    from flwr.clientapp import ClientApp

    from parablock.engine.flower.courier import client_app

    app, courier = ClientApp(), client_app(_site_of)

    @app.train()
    def exchange(message: Any, context: Any) -> Any:
        entered_s = time.time()
        reply = courier(message, context)
        stamps = {"carries": context.node_config["carries"], "entered_s": entered_s, "left_s": time.time()}
        with (Path(str(context.node_config["state"])) / "couriers.jsonl").open("a") as file:
            file.write(json.dumps(stamps) + "\n")
        return reply

    return app


def _server() -> Any:
    from parablock.engine.flower.engine import server_app

    return server_app(serve)


if __name__ == "__main__":
    train(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
elif SETTINGS in os.environ:
    client = _client()
    server = _server() if os.environ.get("PARABLOCK_FLOWER_ROLE") == "server" else None
