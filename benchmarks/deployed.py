"""What an exchange between a server and its sites costs: real processes, mutual TLS, links that `tc tbf` shapes.

    .venv/bin/python benchmarks/deployed.py deployment --only empty

Each site stands in a network namespace of its own, behind a link that is shaped in both directions. What trains
only takes time (`_remote_ends.py`), so that two cores can hold everything; the rest is the product: door, streams,
engine, disk. An exchange is all of a round that is not computation. Links need root, `ip` and `tc`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import _record as kit
import psutil
from _record import Bar, Found, Options, benchmarks, main, record, section, table_of

from parablock.config.keys import RunConfig
from parablock.deploy.authority import make_all
from parablock.deploy.one_machine import Deployment, watch
from parablock.deploy.processes import Process
from parablock.errors import ParaBlockError
from parablock.experiment.progress import LoggedProgress
from parablock.model.blocks import partition_blocks
from parablock.model.pretrained import outline_model
from parablock.storage.files import last_lines

POLL_S, SITES, MOST_FLOWER_RUNS = 0.02, 2, 5
ROUNDS, MBPS, MEGABYTES, LARGE_MEGABYTES, PATIENCE_S = 6, 200.0, 100.0, 400.0, 1800.0
OUTAGE_S, SLOW_MBPS, LAYER_MB = 60.0, 4.0, 116.0
"""An outage, a slow link, and a layer of Llama-3-8B in int4."""
FAST_SITES, SLOW_SITES = 2, 32
EXCHANGE, EMPTY, BALANCED, HOSPITAL = "exchange", "empty", "exchange = compute", "30 Mbit/s"
SLOW, MEMORY, MANY = "4 Mbit/s", "memory", "many sites"
Row = Found


def deployment(options: Options) -> None:
    """Measure rounds of real processes over shaped links: seconds, processor, memory, what is sent again."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # take everything down
    folder, output = kit.fresh_folder(options).resolve(), Path(options.output)
    kept = json.loads(output.read_text(encoding="utf-8"))["results"] if output.exists() else []
    rows = [row for row in kept if row["scenario"] not in options.only]
    for scenario in options.only:
        variants = scenarios(rows, is_small=options.smoke)[scenario]
        if os.geteuid() != 0 and any(each.has_links for each in variants):
            sys.exit(f"{scenario}: network namespaces need root")
        places = [folder / scenario.replace(" ", "-").replace("/", "-") / str(n) for n in range(len(variants))]
        load = os.getloadavg()[0]
        with ThreadPoolExecutor(len(variants)) as pool:
            side_by_side = pool.map if scenario == SLOW else map
            for row in side_by_side(measured, places, variants):
                rows.append({"scenario": scenario, **row, "load": load, "commit": kit.commit()})
                record(options, rows, bars_of(rows), {"mbps": MBPS, "megabytes": MEGABYTES})


@dataclass(frozen=True)
class Wanted:
    """What is deployed."""

    megabytes: float = MEGABYTES  # of a block, 10^6 bytes
    compute_s: float = 0.0  # that a round's training takes
    delay: int = 0
    rounds: int = ROUNDS
    sites: int = 2
    blocks: int = 2
    up_mbps: float = MBPS  # of each site's link; 0: the loopback
    down_mbps: float = MBPS
    lane: int = 0  # which of several deployments at once
    direction: str = ""  # that is slow
    outage_s: float = 0.0  # in the middle of the first transfer in that direction

    @property
    def has_links(self) -> bool:
        return self.up_mbps > 0

    @property
    def wire_s(self) -> float:
        """The seconds of a block on the wire, up and then down."""
        return sum(self.megabytes * 8 / mbps for mbps in (self.up_mbps, self.down_mbps))


def scenarios(rows: list[Row], *, is_small: bool) -> dict[str, list[Wanted]]:
    """Return what is deployed in each scenario; one depends on what is on record."""
    layer_mb, outage_s, large_mb = (2.0, 3.0, 8.0) if is_small else (LAYER_MB, OUTAGE_S, LARGE_MEGABYTES)
    layer = Wanted(layer_mb, rounds=1, sites=1, blocks=1)
    slow = [
        # down in a second round, since a server that has ended does not wait a minute for a site that is cut off
        replace(layer, lane=lane, direction=way, rounds=rounds, outage_s=s, **{f"{way}_mbps": SLOW_MBPS})
        for lane, ((way, rounds), s) in enumerate(product((("up", 1), ("down", 2)), (0.0, outage_s)), start=1)
    ]
    compute_s = 0.6 * Wanted().wire_s
    with suppress(ValueError):
        compute_s = round(round_s(rows, EXCHANGE), 2)
    balanced = Wanted(compute_s=compute_s, rounds=4 if is_small else ROUNDS)
    loopback: Found = {"up_mbps": 0.0, "down_mbps": 0.0}
    few = Wanted(0.004, rounds=12, delay=1, **loopback) if is_small else Wanted(0.004, rounds=60)
    many = [Wanted(0.1 if is_small else 5.0, sites=n, rounds=12, **loopback) for n in (FAST_SITES, SLOW_SITES)]
    return {
        EMPTY: [few],
        EXCHANGE: [
            Wanted(10.0) if is_small else Wanted(MEGABYTES, rounds=3 * ROUNDS)
        ],  # a busy host moves the median
        BALANCED: [balanced, replace(balanced, delay=1, rounds=balanced.rounds + 3)],
        HOSPITAL: [Wanted(4.0 if is_small else 40.0, rounds=ROUNDS + 3, up_mbps=30.0, down_mbps=30.0)],
        SLOW: slow,
        MEMORY: [Wanted(large_mb, rounds=4, sites=4, **loopback)],
        MANY: [replace(each, sites=min(each.sites, 4)) for each in many] if is_small else many,
    }


def measured(folder: Path, wanted: Wanted) -> Row:
    """Deploy, and return how long rounds took, what they cost each end, and what was sent again."""
    print(f"{folder.parent.name}, {wanted.sites} sites, delay {wanted.delay}: load {os.getloadavg()[0]:.2f}")
    with ExitStack() as stack:
        ends = Ends(stack, folder, wanted)
        began_s = ends.wait_for_start()
        if wanted.outage_s:
            ends.links[0].cut_in_the_middle(wanted)
        server, sites = ends.result()
        seconds = time.monotonic() - began_s
    commits = server["commits"]
    steady = slice(2, len(commits) - 1 - wanted.delay)  # at the end nothing is left to overlap with
    rounds = [(at - before, cpu - cpu_before) for (before, cpu_before), (at, cpu) in pairwise(commits)][steady]
    site_cpu = [at - left for site in sites for (_, left), (at, _) in list(pairwise(site["cpu"]))[steady]]
    return {
        **asdict(wanted),
        "seconds": seconds,  # from the first byte on the link to the end of both, for one round
        "rounds_s": [s for s, _ in rounds],
        "server_cpu_s": [cpu for _, cpu in rounds],
        "site_cpu_s": site_cpu,
        "sent_again_bytes": sum(server["sent_again_bytes"]) + sum(site["sent_again_bytes"] for site in sites),
        "server_bytes": [server["idle_bytes"], server["peak_bytes"]],
        "site_bytes": max(([site["idle_bytes"], site["peak_bytes"]] for site in sites), default=None),
    }


# -- what was found
def of(rows: list[Row], scenario: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["scenario"] == scenario and all(row[k] == v for k, v in wanted.items())]


def middle(rows: list[Row], scenario: str, what: str, **wanted: Any) -> float:
    """Return the median of a scenario's rounds; a ValueError where it is not on record."""
    return median(value for row in of(rows, scenario, **wanted) for value in row[what])


def round_s(rows: list[Row], scenario: str, **wanted: Any) -> float:
    return middle(rows, scenario, "rounds_s", **wanted)


def bars_of(rows: list[Row]) -> list[Bar]:
    """Return the bars of what has been measured."""
    made = list[Bar]()

    def add(name: str, limit: float, value: Callable[[], float]) -> None:
        with suppress(ValueError, IndexError):  # not all of it has been measured
            made.append(Bar(name, float(value()), limit))

    def wire_s(scenario: str) -> float:
        return Wanted(**{key: of(rows, scenario)[0][key] for key in ("megabytes", "up_mbps", "down_mbps")}).wire_s

    def slow(what: str, way: str) -> float:
        found = sorted(of(rows, SLOW, direction=way), key=lambda row: float(row["outage_s"]))
        return float(found[1][what] - found[0][what])

    def beyond(end: str, copies: int) -> float:
        (row,) = of(rows, MEMORY)
        idle, peak = row[f"{end}_bytes"]
        return (peak - idle) / (row["megabytes"] * 1e6) - copies * row["blocks"]

    def each(sites: int) -> float:
        return middle(rows, MANY, "server_cpu_s", sites=sites) / sites

    wire, name = f"{MEGABYTES:g} MB each way, {MBPS:g} Mbit/s", "processor seconds of a round"
    add(f"{wire}: exchange / wire one after the other", 0.65, lambda: round_s(rows, EXCHANGE) / wire_s(EXCHANGE))
    add(f"{wire}: {name}, server", 2.0, lambda: middle(rows, EXCHANGE, "server_cpu_s"))
    add(f"{wire}: {name}, site", 1.2, lambda: middle(rows, EXCHANGE, "site_cpu_s"))
    add("an empty exchange, s, median", 0.05, lambda: round_s(rows, EMPTY))
    name = "exchange = compute: round at delay 1 / computation"
    add(name, 1.05, lambda: round_s(rows, BALANCED, delay=1) / of(rows, BALANCED)[0]["compute_s"])
    name = "exchange = compute: delay 1 / delay 0"
    add(name, 0.54, lambda: round_s(rows, BALANCED, delay=1) / round_s(rows, BALANCED, delay=0))
    add("30 Mbit/s: exchange / wire", 0.70, lambda: round_s(rows, HOSPITAL) / wire_s(HOSPITAL))
    for way in ("up", "down"):
        add(f"an outage, {way}: MiB sent again", 4, lambda way=way: slow("sent_again_bytes", way) / 2**20)
        add(f"an outage, {way}: seconds more", OUTAGE_S + 10, lambda way=way: slow("seconds", way))
    add("peak memory of the server beyond two models, blocks", 2.5, lambda: beyond("server", 2))
    add("peak memory of a site beyond its model, blocks", 5, lambda: beyond("site", 1))
    name = f"the server's processor seconds a site, {SLOW_SITES} sites / {FAST_SITES}"
    add(name, 1.2, lambda: each(SLOW_SITES) / each(FAST_SITES))
    return made


def deployment_section(found: Found) -> Found:
    rows, said, lines, parts = found["results"], kit.ABOUT["deployment"], [], []
    for row in (row for row in rows if row["rounds_s"]):
        medians = {key: median(row[f"{key}_s"]) for key in ("rounds", "server_cpu", "site_cpu")}
        peaks = {end: (row[f"{end}_bytes"][1] - row[f"{end}_bytes"][0]) / 1e6 for end in ("server", "site")}
        lines.append(
            row
            | medians
            | {"exchange_s": medians["rounds"] - row["compute_s"] * (1 - row["delay"])}
            | {"least": min(row["rounds_s"]), "most": max(row["rounds_s"]), "num": len(row["rounds_s"])}
            | {f"{end}_mb": peak for end, peak in peaks.items()}
        )
    if lines:
        parts.append(table_of(lines, said["columns"]))
    if slow := of(rows, SLOW):
        parts += [said["slow"].format(**slow[0]), table_of(slow, said["slow_columns"])]
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in rows))
    return section("deployment", found, *parts, f"The rows are of commit {commits}.")


# -- a deployment
class Ends:
    """A server and its sites, each a process, with their links; all of it goes with the stack."""

    def __init__(self, stack: ExitStack, folder: Path, wanted: Wanted) -> None:
        folder.mkdir(parents=True)
        self._stack, self._folder, self._wanted = stack, folder, wanted
        self.links = [Link(wanted, site) for site in range(wanted.sites if wanted.has_links else 0)]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        hosts = [link.gateway for link in self.links] or ["127.0.0.1"] * wanted.sites
        make_all(folder / "keys", wanted.sites, [*dict.fromkeys(hosts)])
        for link in self.links:
            link.lay(stack)
        told = asdict(wanted) | {"servers": []}
        (folder / "wanted.json").write_text(json.dumps(told), encoding="utf-8")
        self._launch("server", [])
        self._wait_for((folder / "port").exists)
        told["servers"] = [f"{host}:{(folder / 'port').read_text()}" for host in hosts]
        (folder / "wanted.json").write_text(json.dumps(told), encoding="utf-8")
        for site in range(wanted.sites):
            self._launch(str(site), self.links[site].inside if self.links else [])

    def wait_for_start(self) -> float:
        """Return when the beginning of a block is on a link; at once where there are no links."""
        beginning = 1e6 * min(1, self._wanted.megabytes / 8)
        self._wait_for(lambda: not self.links or max(self.links[0].moved()) > beginning)
        return time.monotonic()

    def result(self) -> tuple[Found, list[Found]]:
        """Wait for the end, or the last commit of a link that is slow down; return what both ends have found."""
        names = ["server", *(f"site-{site}" for site in range(self._wanted.sites))]
        if self._wanted.direction == "down":
            names = ["committed"]
        files = [self._folder / f"{name}.json" for name in names]
        self._wait_for(lambda: all(file.exists() for file in files))
        server, *sites = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        return server, sites

    def _wait_for(self, what: Callable[[], bool]) -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        while not what():
            for name, process in self._processes.items():
                if process.poll() or time.monotonic() > give_up_s:
                    sys.exit(f"{name} ended, or takes too long:\n{last_lines(self._folder / f'{name}.log', 20)}")
            time.sleep(0.05)

    def _launch(self, name: str, inside: list[str]) -> None:
        ends = str(Path(__file__).with_name("_remote_ends.py"))
        command = [*inside, sys.executable, ends, name, str(self._folder)]
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self._processes[name] = process
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)


class Link:
    """A site's network: the server's end in our namespace, the site's end in one of its own."""

    def __init__(self, wanted: Wanted, site: int) -> None:
        name, self._up_mbps, self._down_mbps = f"{wanted.lane}-{site}", wanted.up_mbps, wanted.down_mbps
        self._namespace, self._outer, self._inner = f"parablock{name}", f"pbo{name}", f"pbi{name}"
        self.gateway = f"10.77.{8 * wanted.lane + site}.1"
        self.inside = ["ip", "netns", "exec", self._namespace]

    def lay(self, stack: ExitStack) -> None:
        """Make the link; it goes with the stack."""
        call("ip", "netns", "add", self._namespace)
        stack.callback(call, "ip", "netns", "del", self._namespace)
        call("ip", "link", "add", self._outer, "type", "veth", "peer", "name", self._inner)
        stack.callback(call, "ip", "link", "del", self._outer)  # at once; with the namespace it goes when it likes
        call("ip", "link", "set", self._inner, "netns", self._namespace)
        ends = (((), self._outer, "1", self._down_mbps), (self.inside, self._inner, "2", self._up_mbps))
        for inside, device, last, mbps in ends:
            call(*inside, "ip", "addr", "add", f"{self.gateway[:-1]}{last}/24", "dev", device)
            call(*inside, "ip", "link", "set", device, "up")
            shape = ("rate", f"{mbps:g}mbit", "burst", "256kb", "latency", "200ms")
            call(*inside, "tc", "qdisc", "add", "dev", device, "root", "tbf", *shape)
        call(*self.inside, "ip", "link", "set", "lo", "up")

    def cut_in_the_middle(self, wanted: Wanted) -> None:
        """Take the link down once half of a block has moved in the slow direction."""
        place = 0 if wanted.direction == "up" else 1
        while self.moved()[place] < wanted.megabytes * 5e5:
            time.sleep(0.05)
        self.cut(wanted.outage_s)

    def cut(self, outage_s: float) -> None:
        """Take the link down for a while."""
        call("ip", "link", "set", self._outer, "down")
        time.sleep(outage_s)
        call("ip", "link", "set", self._outer, "up")

    def moved(self) -> tuple[int, int]:
        """Return the bytes that went up and down so far, headers and all."""
        counts = Path("/sys/class/net") / self._outer / "statistics"
        up, down = (int((counts / name).read_text()) for name in ("rx_bytes", "tx_bytes"))
        return up, down


def call(*command: str) -> None:
    subprocess.run(command, check=True)


# -- a Flower run
def flower_exchange(options: Options) -> None:
    """Measure the exchange of a Flower run: SuperLink, SuperNodes and apps, each site behind a shaped link."""
    if os.geteuid() != 0:
        sys.exit("network namespaces need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # take everything down
    folder = kit.fresh_folder(options).resolve()
    material = kit.generated(folder / "material", num_clients=SITES)
    wide = wider(Path(material.model), folder / "wide", options.hidden_size, options.intermediate_size)
    config = kit.configured(replace(material, model=str(wide)), kit.training(options) | {"engine.clock": None})
    blocks = partition_blocks(outline_model(str(wide), dtype="float32"), layers_per_block=1)
    megabytes = 4e-6 * max(block.num_parameters for block in blocks)
    load = os.getloadavg()[0]
    with RealFederation(folder / "run", config, options.mbps) as town:
        while not town.has_ended():
            time.sleep(POLL_S)
        town.wait()
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [{key: json.loads(line)[key] for key in ("round_s", "compute_s")} for line in lines]
    steady = [row["round_s"] - row["compute_s"] for row in rounds[2:-1]]
    wire_s = Wanted(megabytes, up_mbps=options.mbps, down_mbps=options.mbps).wire_s
    found = {"megabytes": megabytes, "wire_s": wire_s, "exchange_s": steady, "rounds": rounds, "load": load}
    bars = [Bar("a Flower run: exchange / wire one after the other, median", median(steady) / wire_s, 0.65)]
    record(options, found, bars, config)


def wider(model: Path, target: Path, hidden_size: int, intermediate_size: int) -> Path:
    """Write the outline and tokenizer of a model again, with two layers of another width, to be drawn at random."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": hidden_size // 4}
    config |= {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": 2} | heads
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def flower_exchange_section(found: Found) -> Found:
    results = found["results"]
    times = results["exchange_s"]
    row = results | {"median_s": median(times), "least": min(times), "most": max(times), "num": len(times)}
    row |= {"compute_s": median(each["compute_s"] for each in results["rounds"])}
    return section("flower_exchange", found, table_of([row], kit.ABOUT["flower_exchange"]["columns"]))


class RealFederation(Deployment):
    """A SuperLink here, and SuperNodes in network namespaces of their own; a supervisor starts again what ends."""

    host = "10.77.255.1"

    def __init__(self, directory: Path, config: RunConfig, mbps: float) -> None:
        super().__init__(directory, SITES)
        self.links = [Link(Wanted(up_mbps=mbps, down_mbps=mbps), site) for site in range(SITES)]
        self.submitted, self._config, self._stack, self._leaves = 0, config, ExitStack(), False

    def __enter__(self) -> RealFederation:
        with ExitStack() as stack:
            call("ip", "addr", "add", f"{self.host}/32", "dev", "lo")
            stack.callback(call, "ip", "addr", "del", f"{self.host}/32", "dev", "lo")
            for link in self.links:
                link.lay(stack)
                call(*link.inside, "ip", "route", "add", "default", "via", link.gateway)
            self.prepare(self._config)
            super().__enter__()
            stack.callback(super().__exit__, None, None, None)
            self._run = stack.enter_context(ThreadPoolExecutor(1)).submit(self._watch)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaves = True
        self._stack.close()

    def _launch(self, name: str, started: Process) -> None:
        command, env = started
        if name.startswith("supernode-") and command[0] != "ip":
            command = [*self.links[int(name.split("-")[1])].inside, *command]
        super()._launch(name, (command, env))

    def _watch(self) -> None:
        """Run to the end; start another Flower run where the ServerApp was killed, as the message says."""
        while True:
            self.submitted += 1
            try:
                watch(self, self.submit(), LoggedProgress(), lambda: self._leaves)
                return
            except ParaBlockError as error:
                print(error.what)
                if "the ServerApp ended" not in error.what or self.submitted > MOST_FLOWER_RUNS:
                    raise

    def has_ended(self) -> bool:
        return self._run.done()

    def wait(self) -> None:
        self._run.result(PATIENCE_S)

    def strike(self, part: str, site: int, outage_s: float) -> None:
        """Kill a process, which is nobody's to start again but the supervisor's; or cut a site off for a while."""
        if part == "network":
            self.links[site].cut(outage_s)
            return
        while (pid := self._pid_of(part, site)) is None:  # it is away already
            time.sleep(POLL_S)
        os.kill(pid, signal.SIGKILL)

    def _pid_of(self, part: str, site: int) -> int | None:
        if part == "trainer":
            return self.trainer_pid(site)
        if part != "ServerApp":
            process = self.processes["superlink" if part == "SuperLink" else f"supernode-{site}"]
            return process.pid if process.poll() is None else None
        helper = psutil.Process(self.processes["superlink-helper"].pid)
        apps = [
            child.pid for child in helper.children(recursive=True) if "flwr-serverapp" in " ".join(child.cmdline())
        ]
        return apps[0] if apps else None


BENCHMARKS = benchmarks(globals())

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
