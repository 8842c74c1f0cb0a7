"""What `deployed.py` starts: the engine of real sites behind the real door, with training that only takes time.

python benchmarks/_remote_ends.py server|0|1|… FOLDER, which holds `wanted.json`, and gets what each end has found.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parablock.clock import RealClock
from parablock.deploy.allocation import keep_memory
from parablock.deploy.door import listen, server_of
from parablock.engine.contract import EngineInput
from parablock.engine.local_steps import FixedSteps
from parablock.engine.plans import ClientPlan, Hooks, ServerPlan
from parablock.engine.remote.remote_engine import RunFacts, run_remote
from parablock.engine.remote.site_channel import SiteCaller, SiteChannel
from parablock.engine.remote.site_client import run_client
from parablock.engine.update_form import Differences
from parablock.storage.files import write_atomically
from parablock.storage.site_store import SiteStore
from parablock.trace import Trace
from parablock.training.trainer import Trained
from parablock.wire.quantize import Encoding

CHUNK_BYTES = 4_194_304
"""As `wire.chunk_bytes` is where nobody says otherwise."""


def memory_bytes(which: str) -> int:
    """Return the process's memory now, VmRSS, or the most that it has had, VmHWM."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(rf"{which}:\s+(\d+)", status)[0])


class Ends:
    """What both ends of a benchmark know."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # as a run does
        self.wanted: dict[str, Any] = json.loads((folder / "wanted.json").read_text(encoding="utf-8"))
        self.form = Differences(Encoding("float32", chunk_bytes=CHUNK_BYTES))
        self.client_plan = ClientPlan("aligned", self.form, self.wanted["delay"] + 1)
        self.elements = max(1, int(self.wanted["megabytes"] * 1e6 / 4))
        self.trace, self.folder, self.idle_bytes = Trace(RealClock()), folder, memory_bytes("VmRSS")

    def params(self) -> list[Tensor]:
        return [torch.zeros(self.elements).fill_(1) for _ in range(self.wanted["blocks"])]

    def keys(self, name: str) -> Path:
        return self.folder / "keys" / name

    def found(self, name: str, **facts: Any) -> None:
        told = {"idle_bytes": self.idle_bytes, "peak_bytes": memory_bytes("VmHWM")}
        write_atomically(self.folder / f"{name}.json", json.dumps(facts | told))

    def serve(self) -> None:
        """Run the rounds; note when each was committed, and the processor's seconds until then."""
        wanted, trace, opened, commits = self.wanted, self.trace, [], []

        def tell(name: str) -> None:
            again = [place.stream.sent_again_bytes for place in opened[0].places.values()]
            self.found(name, commits=commits, sent_again_bytes=again)

        def on_commit(*_: object) -> None:
            commits.append((trace.clock.now(), time.process_time()))
            if len(commits) == wanted["rounds"]:
                tell("committed")

        hooks = Hooks(on_commit, lambda _: None)
        listener = listen("0.0.0.0:0", self.keys("server"), wanted["sites"], print)
        write_atomically(self.folder / "port", str(listener.port))
        plan = ServerPlan(
            *(wanted[key] for key in ("sites", "rounds", "delay")),
            *("cyclic", 1.0, 0, self.form, FixedSteps(1), 900.0, 0),
            folder=self.folder,
        )
        given = EngineInput(plan, self.client_plan, self.params, (), trace, hooks)
        with closing(listener):
            run_remote(
                given, listener, RunFacts("benchmark", "", ""), num_sites=wanted["sites"], on_open=opened.append
            )
        tell("server")

    def train(self, client_id: int) -> None:
        """Be a site."""
        server = server_of(self.wanted["servers"][client_id], self.keys(f"site-{client_id}"), print)
        caller, trainer = SiteCaller(client_id, server, print), Sleeper(self.wanted["compute_s"], client_id)
        opening = caller.wait_for_session(self.trace.clock)
        channel = SiteChannel(caller, opening, secrets.token_hex(8), self.trace, lease_s=900.0)
        rejoins = channel.open()
        with closing(channel), channel:
            run_client(
                client_id,
                self.client_plan,
                trainer,
                channel,
                self.trace,
                store=SiteStore(self.folder / f"state-{client_id}"),
                take_params=self.params,
                marks_kept=1,
                rejoins=rejoins,
            )
        again = channel.stream.sent_again_bytes
        self.found(f"site-{client_id}", cpu=trainer.cpu, sent_again_bytes=again)


@dataclass
class Sleeper:
    """A trainer whose round takes so many seconds, and next to none of the processor's."""

    compute_s: float
    client_id: int
    num_examples = 1
    step_time_s = None

    def __post_init__(self) -> None:
        self.cpu: list[tuple[float, float]] = []

    def train(self, _: int, block_index: int, *rest: Any) -> Trained:
        """Return the block with something added; note the processor's seconds before and after."""
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        trained = rest[-1][block_index] + 0.001 * (1 + self.client_id)
        time.sleep(max(0.0, began_s + self.compute_s - time.monotonic()))
        self.cpu.append((began_cpu_s, time.process_time()))
        return Trained(trained, 0.0)

    def memory(self) -> dict[str, Tensor]:
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        assert not memory


if __name__ == "__main__":
    keep_memory()  # as `parablock deploy server` and `deploy client` do
    ends = Ends(Path(sys.argv[2]))
    if sys.argv[1] == "server":
        ends.serve()
    else:
        ends.train(int(sys.argv[1]))
