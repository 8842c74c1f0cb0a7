"""One deployment for `flower.py`: SuperLink, SuperNodes behind links of their own, and what is seen of them.

What a SuperNode says is written down with the time, so that the seconds of an exchange can be told apart; the
memory of every process is looked at while it lives.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from _flower_apps import SETTINGS
from _links import Link, Swallower

from parablock.deploy.keys import make_keys
from parablock.deploy.processes import (
    CONNECTION,
    LANES,
    ServerFiles,
    environment,
    flower,
    register_sites,
    server_environment,
    site_environment,
    submit,
    superlink_command,
    supernode_command,
    wait_for_port,
    write_connection,
)

PORT = 8765
ROLES = {
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "ClientApp",
    "_flower_apps.py": "trainer",
}


@dataclass(frozen=True)
class Wanted:
    """What is deployed.

    Attributes:
        megabytes: Of a block, 10^6 bytes.
        compute_s: Seconds that a round's training takes.
        delay: d.
        rounds: How many.
        sites: How many.
        blocks: Of the model.
        chunk_mib: Of an update; the server folds and sends on chunk by chunk.
        up_mbps: Of each site's link, 10^6 bit/s; 0: as fast as it goes.
        down_mbps: Likewise, from the server.
        secure: With TLS and node keys.
        lane: Which of several deployments at once.
        swallows: Whether a proxy that can lose an answer stands before the server.
        supernodes: Of a site: one for both directions, or one for each.
        warm: Whether a ClientApp is forked from a process that has loaded Flower, or starts from nothing.
    """

    megabytes: float
    compute_s: float = 0.0
    delay: int = 0
    rounds: int = 5
    sites: int = 2
    blocks: int = 3
    chunk_mib: int = 4
    up_mbps: float = 200.0
    down_mbps: float = 200.0
    secure: bool = True
    lane: int = 0
    swallows: bool = False
    supernodes: int = 2
    warm: bool = True

    @property
    def patience_s(self) -> float:
        """How long the whole may take."""
        slowest = min(self.up_mbps or 1000.0, self.down_mbps or 1000.0)
        carried_s = 60 + 4 * 8 * self.megabytes / slowest  # several sites share this machine
        return 180 + self.rounds * (5 * self.compute_s + carried_s * max(1, self.sites - 1))


class Deployment:
    """Everything that runs while one scenario is measured.

    Args:
        stack: Takes it down.
        folder: A new one.
        wanted: What is deployed.
    """

    def __init__(self, stack: ExitStack, folder: Path, wanted: Wanted) -> None:
        folder.mkdir(parents=True)
        self._stack, self._folder, self._wanted = stack, folder, wanted
        self.links = [Link(wanted.lane, i, wanted.up_mbps, wanted.down_mbps) for i in range(wanted.sites)]
        self.output, port = folder / "result.json", PORT + wanted.lane
        self.peaks: dict[str, int] = {}
        keys = folder / "keys" if wanted.secure else None
        if keys is not None:
            make_keys(keys, wanted.sites, ["127.0.0.1", *(link.gateway for link in self.links)])
        files = ServerFiles(folder / "home", keys and keys / "server", f"127.0.0.1:{port}")
        write_connection(files)
        for link in self.links:
            link.lay(stack)
        listening = ServerFiles(files.home, files.keys, f"0.0.0.0:{port}")
        env = server_environment(files.home, {**self._settings(), "PARABLOCK_FLOWER_ROLE": "server"})
        superlink = self._launch("superlink", superlink_command(listening), env)
        wait_for_port(files.address, superlink, folder / "superlink.log")
        if keys is not None:
            register_sites(files)
        self.swallower = self._place_swallower(port) if wanted.swallows else None
        for link in self.links:
            self._start_site(link, keys, self.swallower.port if self.swallower else port)
        self._files, self._run_id = files, submit(files, _write_app(folder / "app"))
        self._is_watching = True
        watch = threading.Thread(target=self._watch_memory, daemon=True)
        watch.start()
        stack.callback(self._stop_watching)

    def result(self, meanwhile: Callable[[Deployment], None] = lambda _: None) -> dict[str, Any]:
        """Wait for the end of the run; give what the server wrote, and what the sites' processes noted."""
        give_up = time.monotonic() + self._wanted.patience_s
        while not self.output.exists():
            if self._has_ended() and not self.output.exists():  # which is there before the run ends, if at all
                sys.exit(f"the run ended without a result:\n{self._flower_says()}")
            if time.monotonic() > give_up:
                sys.exit(f"no result in time; look at {self._folder}")
            meanwhile(self)
            time.sleep(0.5)
        found: dict[str, Any] = json.loads(self.output.read_text())
        found["sites"] = [
            {
                "supernodes": {
                    carries: (self._folder / f"site-{link.site}-{carries}.log").read_text(errors="replace")
                    for carries in LANES[self._wanted.supernodes]
                },
                "couriers": (self._folder / f"site-{link.site}" / "couriers.jsonl").read_text(),
            }
            for link in self.links
        ]
        return found

    def _has_ended(self) -> bool:
        log = (self._folder / "superlink.log").read_text(errors="replace")
        return re.search(rf"Finished task \d+ of run {self._run_id}", log) is not None

    def _flower_says(self) -> str:
        command = [flower("flwr"), "list", "--run-id", self._run_id, CONNECTION]
        return subprocess.run(command, env=environment(self._files.home), capture_output=True, text=True).stdout

    def _settings(self) -> dict[str, str]:
        wanted = self._wanted
        return {
            SETTINGS: json.dumps(
                {
                    "elements": max(1, int(wanted.megabytes * 1e6 / 4)),
                    "blocks": wanted.blocks,
                    "clients": wanted.sites,
                    "rounds": wanted.rounds,
                    "delay": wanted.delay,
                    "compute_s": wanted.compute_s,
                    "chunk_bytes": wanted.chunk_mib << 20,
                    "output": str(self.output),
                }
            )
        }

    def _place_swallower(self, port: int) -> Swallower:
        swallower = Swallower(self.links[0].gateway, port)
        self._stack.callback(swallower.close)
        return swallower

    def _start_site(self, link: Link, keys: Path | None, port: int) -> None:
        state = self._folder / f"site-{link.site}"
        state.mkdir()
        own_keys = keys and keys / state.name
        for place, carries in enumerate(LANES[self._wanted.supernodes]):
            superlink, own_port = f"{link.gateway}:{port}", 9100 + 10 * place + link.site
            command = [*link.inside, *supernode_command(superlink, own_keys, state, own_port, carries)]
            config = command.index("--node-config") + 1
            command[config] += f' state="{state}" client-id={link.site}'
            home = self._folder / f"home-{link.site}-{carries}"
            around = site_environment if self._wanted.warm else environment
            self._launch(f"{state.name}-{carries}", command, around(home, self._settings()))

    def _launch(self, name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        threading.Thread(
            target=_stamp_lines, args=(process.stdout, self._folder / f"{name}.log"), daemon=True
        ).start()

        def end() -> None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        self._stack.callback(end)
        return process

    def _watch_memory(self) -> None:
        """Keep the most that any process of each kind has had; those of this deployment have its folder at home."""
        mark, foreign = f"FLWR_HOME={self._folder}".encode(), set[str]()
        while self._is_watching:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if process.name in foreign:
                        continue
                    if mark not in (process / "environ").read_bytes():
                        foreign.add(process.name)
                    elif role := _role_of(process):
                        self.peaks[role] = max(self.peaks.get(role, 0), _peak_of(process))
                except OSError:  # it has just ended
                    continue
            time.sleep(0.5)

    def _stop_watching(self) -> None:
        self._is_watching = False


def now() -> float:
    """Give the seconds since 1970."""
    return datetime.now(UTC).timestamp()


def _stamp_lines(source: IO[bytes], path: Path) -> None:
    with path.open("w", buffering=1) as log:
        for line in source:
            log.write(f"{now():.3f} {line.decode(errors='replace')}")


def _role_of(process: Path) -> str:
    cmdline = (process / "cmdline").read_text(errors="replace").split("\0")
    arguments = [(process / "comm").read_text().strip(), *(Path(part).name for part in cmdline[:3])]
    return next((role for name, role in ROLES.items() if name in arguments), "")


def _peak_of(process: Path) -> int:
    lines = (process / "status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _write_app(directory: Path) -> Path:
    """Write the Flower app whose parts stand in `_flower_apps.py`."""
    directory.mkdir()
    (directory / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "parablock-benchmark"\nversion = "1.0.0"\n'
        '[tool.flwr.app]\npublisher = "parablock"\n'
        '[tool.flwr.app.components]\nserverapp = "_flower_apps:server"\nclientapp = "_flower_apps:client"\n'
        "[tool.flwr.app.config]\n"
    )
    return directory


def python_path(*folders: Path) -> str:
    """Give a search path that begins with these."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH", "")])])
