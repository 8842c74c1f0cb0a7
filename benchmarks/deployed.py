"""What Flower's chain costs, and how much of it ParaBlock hides: real SuperLink, SuperNodes and trainers.

    .venv/bin/python benchmarks/deployed.py flower --only empty

Each site stands in a network namespace of its own, behind a link that `tc tbf` shapes in both directions; what
trains only takes time (`_flower_apps.py`), so that two cores can hold everything. "Exchange" is everything that is
not computation: Flower's polls, processes and copies, and the bytes. Needs root, `ip` and `tc`, and the extra
`flower`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import IO, Any

import _record as kit
from _flower_apps import SETTINGS
from _record import Bar, Found, Options, benchmarks, main, record, section, table, table_of

from parablock.deploy import processes
from parablock.deploy.credentials import make_keys
from parablock.deploy.processes import LANES, ServerFiles, server_environment, supernode_command

SITES, ROUNDS, REPEATS, MBPS, MEGABYTES, LARGE_MEGABYTES = 2, 6, 3, 200.0, 100.0, 400.0
OUTAGE_S, SLOW_MBPS, LAYER_MB, PATIENCE_S = 60.0, 4.0, 116.0, 3600.0
"""An outage, a slow link, a layer of Llama-3-8B in int4, and how long a run may take."""

WIRE_S = 2 * MEGABYTES * 8 / MBPS
"""The seconds that a block takes on the wire, up and down."""

DISTURBANCES = ("nothing", f"an outage of {OUTAGE_S:g} s", "an answer lost")
EQUAL, LONG, BALANCED, HOSPITAL = "wire = compute", "covered", "exchange = compute", "30 Mbit/s"
Row = Found


def flower(options: Options) -> None:
    """Measure rounds over real Flower processes and shaped links: seconds, where they go, memory, lost answers."""
    if os.geteuid() != 0:
        sys.exit("network namespaces need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # take everything down
    folders = (kit.REPOSITORY / "benchmarks", kit.REPOSITORY / "src", os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, folders))  # Flower looks there
    folder, output = kit.fresh_folder(options), Path(options.output)
    kept = json.loads(output.read_text(encoding="utf-8"))["results"] if output.exists() else []
    rows = [row for row in kept if row["scenario"] not in options.only]
    for scenario in options.only:
        variants = scenarios(rows, is_small=options.smoke)[scenario]
        places = [folder / scenario.replace(" ", "-") / str(number) for number in range(len(variants))]
        with ThreadPoolExecutor(len(variants)) as pool:
            side_by_side = pool.map if scenario.startswith("slow") else map
            for row in side_by_side(measured, places, variants):
                rows.append({"scenario": scenario, **row, "commit": kit.commit()})
                record(options, rows, bars_of(rows), {"mbps": MBPS, "megabytes": MEGABYTES, "sites": SITES})


@dataclass(frozen=True)
class Wanted:
    """What is deployed."""

    megabytes: float = MEGABYTES  # of a block, 10^6 bytes
    compute_s: float = 0.0  # that a round's training takes
    delay: int = 0
    rounds: int = ROUNDS
    sites: int = SITES
    blocks: int = 3
    chunk_mib: int = 4  # of an update; the server folds and sends on chunk by chunk
    up_mbps: float = MBPS  # of each site's link; 0: as fast as it goes
    down_mbps: float = MBPS
    secure: bool = True  # with TLS and node keys
    lane: int = 0  # which of several deployments at once
    supernodes: int = 2  # of a site: one for both directions, or one for each
    warm: bool = True  # a ClientApp is forked from a process that has loaded Flower, or starts from nothing
    repeat: int = 0
    direction: str = ""  # that is slow and disturbed
    disturbance: str = ""


def scenarios(rows: list[Row], *, is_small: bool) -> dict[str, list[Wanted]]:
    """Return what is deployed in each scenario; one depends on what is on record."""

    def slow(direction: str, lane: int) -> list[Wanted]:
        size, speed = 4.0 if is_small else LAYER_MB, {f"{direction}_mbps": SLOW_MBPS, "direction": direction}
        one = Wanted(size, rounds=1, sites=1, blocks=1, **speed)
        return [replace(one, lane=lane + place, disturbance=what) for place, what in enumerate(DISTURBANCES)]

    def both(**how: Any) -> list[Wanted]:
        return [Wanted(delay=delay, rounds=ROUNDS + delay, **how) for delay in (0, 1)]

    equal = list[Wanted]()
    for repeat in range(REPEATS):  # delay 0 and 1 in turn; in between without TLS, once two SuperNodes
        pair = both(compute_s=WIRE_S, supernodes=1, repeat=repeat)
        equal += pair + ([replace(pair[1], secure=False)] if repeat % 2 == 0 else [])
        equal += [replace(each, supernodes=2) for each in pair] if repeat == 0 else []
    balanced = 1.5 * WIRE_S
    with suppress(ValueError):  # an exchange through Flower where the wire took as long as the computation
        balanced = round_s(rows, EQUAL, delay=0, supernodes=2) - WIRE_S
    hospital = both(megabytes=40.0, up_mbps=30.0, down_mbps=30.0, compute_s=8.0)[1]
    few = Wanted(0.004, rounds=3 if is_small else 10, supernodes=1)
    large = Wanted(8.0 if is_small else LARGE_MEGABYTES, rounds=2, blocks=1, up_mbps=0, down_mbps=0)
    return {
        "empty": [few, replace(few, warm=False)],
        EQUAL: equal,
        LONG: both(compute_s=2.5 * WIRE_S),
        BALANCED: both(compute_s=round(balanced, 1)),
        HOSPITAL: [replace(hospital, supernodes=supernodes) for supernodes in (1, 2)],
        "slow link, up": slow("up", 1),
        "slow link, down": slow("down", 4),
        "memory": [replace(large, sites=sites) for sites in (2, 4)],
    }


def measured(folder: Path, wanted: Wanted) -> Row:
    """Deploy, and return how long rounds took, where each second went, who used memory, what a link moved."""
    done = [wanted.disturbance in ("", DISTURBANCES[0])]
    place = 0 if wanted.direction == "up" else 1

    def disturb(deployment: Deployment) -> None:
        if done[0] or deployment.links[0].moved()[place] < wanted.megabytes * 5e5:
            return
        done[0] = True
        if deployment.swallower is not None:
            deployment.swallower.direction = wanted.direction
        else:
            deployment.links[0].cut(OUTAGE_S)

    with ExitStack() as stack:
        deployment = Deployment(stack, folder, wanted)
        result = deployment.result(disturb)
        moved, swallower = deployment.links[0].moved()[place], deployment.swallower
    if not wanted.disturbance:
        between = [after - before for before, after in pairwise(result["commits"])]
        steady = between[2 : len(between) - wanted.delay] or between  # at the end nothing is left to overlap with
        chain = {} if wanted.delay else chain_of(result)
        return {**asdict(wanted), "rounds": steady, "chain": chain, "peak_bytes": deployment.peaks}
    spans, activity = result["spans"], f"{wanted.direction}loading"
    return {
        **{key: getattr(wanted, key) for key in ("direction", "disturbance", "megabytes")},
        "happened": done[0] and (swallower is None or swallower.swallowed == 1),
        "mbps": SLOW_MBPS,
        "seconds": max(start + length for _, _, start, length, _ in spans) - min(span[2] for span in spans),
        "wire_bytes": moved,
        "part_bytes": max(facts["payload_bytes"] for _, name, _, _, facts in spans if name == activity),
    }


# -- what was found
def of(rows: list[Row], scenario: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["scenario"] == scenario and all(row[k] == v for k, v in wanted.items())]


def round_s(rows: list[Row], scenario: str, **wanted: Any) -> float:
    """Return the median round, over the repeats of a scenario; a ValueError where it is not on record."""
    return median(seconds for row in of(rows, scenario, **wanted) for seconds in row["rounds"])


def bars_of(rows: list[Row]) -> list[Bar]:
    """Return the bars of what has been measured."""
    made = list[Bar]()

    def add(name: str, limit: float, value: Callable[[], float]) -> None:
        with suppress(ValueError):  # not all of it has been measured
            made.append(Bar(name, float(value()), limit))

    def at(scenario: str, delay: int, *supernodes: int) -> float:
        for many in supernodes or (2, 1):  # of one SuperNode where two are not on record
            with suppress(ValueError):
                return round_s(rows, scenario, delay=delay, secure=True, supernodes=many)
        raise ValueError(scenario)

    def faster(scenario: str, *supernodes: int) -> float:
        return at(scenario, 1, *supernodes) / at(scenario, 0, *supernodes)

    def balanced() -> float:
        compute_s = max(row["compute_s"] for row in of(rows, BALANCED))
        return at(BALANCED, 1) / max(compute_s, at(BALANCED, 0) - compute_s)

    warm, cold = (partial(round_s, rows, "empty", warm=is_warm) for is_warm in (True, False))
    add("seconds of an empty exchange", 5.0, warm)
    name = "an empty exchange: a forked ClientApp / one that starts from nothing"
    add(name, 0.85, lambda: warm() / cold())
    for many, which in ((2, "two SuperNodes a site"), (1, "one SuperNode a site")):
        add(f"wire = compute, {which}: delay 1 / delay 0", 0.65, partial(faster, EQUAL, many))
        name = f"an exchange / its time on the wire, {which}"
        add(name, 1.6, lambda many=many: (at(EQUAL, 0, many) - WIRE_S) / WIRE_S)
    add("covered: round / compute at delay 1", 1.06, lambda: at(LONG, 1) / (2.5 * WIRE_S))
    add("covered: delay 1 / delay 0", 0.60, partial(faster, LONG))
    add("exchange = compute: round at delay 1 / max(compute, exchange through Flower)", 1.05, balanced)
    add("exchange = compute: delay 1 / delay 0", 0.60, partial(faster, BALANCED))
    name = "30 Mbit/s, delay 1: a round with two SuperNodes a site / with one"
    add(name, 0.75, lambda: at(HOSPITAL, 1, 2) / at(HOSPITAL, 1, 1))
    add("TLS and node keys / insecure, in turn", 1.10, partial(tls, rows))
    for way in ("up", "down"):
        add(f"slow link, {way}: bytes sent again / a part", 1.0, partial(again, rows, way))
    for role, limit in (("ServerApp", 4.0), ("ClientApp", 3.0)):
        peaks = [row["peak_bytes"][role] / (row["megabytes"] * 1e6) for row in of(rows, "memory")]
        add(f"peak memory of the {role}, in blocks", limit, partial(max, peaks))
    return made


def tls(rows: list[Row]) -> float:
    """Return the median round with TLS and keys over that without, of the repeats that have both."""
    insecure = of(rows, EQUAL, delay=1, secure=False)
    beside = {(row["repeat"], row["supernodes"]) for row in insecure}
    secure = [r for r in of(rows, EQUAL, delay=1, secure=True) if (r["repeat"], r["supernodes"]) in beside]
    with_it, without = (median(s for row in found for s in row["rounds"]) for found in (secure, insecure))
    return with_it / without


def again(rows: list[Row], direction: str) -> float:
    """Return the most that a disturbance made be sent again, in parts."""
    found = {row["disturbance"]: row for row in of(rows, f"slow link, {direction}")}
    plain = found.pop(DISTURBANCES[0], None)
    if plain is None or not all(row["happened"] for row in found.values()):
        raise ValueError("there was nothing to send again")
    return max((row["wire_bytes"] - plain["wire_bytes"]) / row["part_bytes"] for row in found.values())


def flower_section(found: Found) -> Found:
    rows: list[Row] = found["results"]
    said, slow_rows, memories = (
        kit.ABOUT["flower"],
        [row for row in rows if row.get("disturbance")],
        of(rows, "memory"),
    )
    parts = [
        said["covered"],
        rounds_table([row for row in rows if row["scenario"] != "memory" and "rounds" in row]),
    ]
    if chains := [row for row in rows if row["scenario"] in ("empty", EQUAL) and row.get("chain")]:
        parts += ["Where each second of a round goes, at delay 0:", chain_table(chains)]
    if slow_rows:
        told = [row | {f"mega_{key}": row[key] / 1e6 for key in ("wire_bytes", "part_bytes")} for row in slow_rows]
        parts += [said["slow"].format(**slow_rows[0]), table_of(told, said["slow_columns"])]
    if memories:
        heads = [f"{row['sites']} sites, {row['megabytes']:g} MB: GB (blocks)" for row in memories]
        size, peaks_of_rows = memories[0]["megabytes"] * 1e6, [row["peak_bytes"] for row in memories]
        lines = [
            [role, *(f"{peaks[role] / 1e9:.2f} ({peaks[role] / size:.1f})" for peaks in peaks_of_rows)]
            for role in sorted(memories[0]["peak_bytes"])
        ]
        parts += ["Most memory of a process, by sites and size of a block:", table(["process", *heads], lines)]
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in rows))
    return section("flower", found, *parts, f"The rows are of commit {commits}.")


def rounds_table(rows: list[Row]) -> Found:
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        way = f"{row['scenario']}: delay {row['delay']}{'' if row['secure'] else ', without TLS'}"
        way += (", one SuperNode" if row["supernodes"] == 1 else "") + ("" if row["warm"] else COLD)
        groups[way, row["megabytes"], row["compute_s"]] += row["rounds"]
    lines = [
        {"way": way, "mega": mega, "compute_s": compute_s, "rounds": len(found), "least": min(found)}
        | {"most": max(found), "median": median(found), "exchange_s": median(found) - compute_s}
        for (way, mega, compute_s), found in groups.items()
    ]
    return table_of(lines, kit.ABOUT["flower"]["columns"])


COLD = ", ClientApps from nothing"


def chain_table(rows: list[Row]) -> Found:
    groups: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for row in rows:
        which = ("one SuperNode" if row["supernodes"] == 1 else "two SuperNodes") + ("" if row["warm"] else COLD)
        groups[f"{row['scenario']}, {which}"].append(row["chain"])
    columns = [{name: median(chain[name] for chain in found) for name in found[0]} for found in groups.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [[name, *(f"{column[name]:.2f}" if name in column else "" for column in columns)] for name in names]
    return table(["", *groups], lines)


# -- where each second goes
SLEEPS = "nothing for the SuperNode: the server takes, folds, hands over; the SuperNode sleeps"
DOWNLOAD = "download: link to SuperNode"
TO_CLIENTAPP = "SuperNode to ClientApp, which polls"
TRAINER = "courier and trainer, without the computation"
COMPUTATION = "computation, and encoding"
TO_SUPERNODE = "hashing, ClientApp to SuperNode, which polls"
UPLOAD = "upload: SuperNode to link"
STAGES = (SLEEPS, DOWNLOAD, TO_CLIENTAPP, TRAINER, COMPUTATION, TO_SUPERNODE, UPLOAD)
"""What a SuperNode, which does one thing at a time, does with a round; together they are the round."""

COMMIT = "(the server: from the last byte of the last site to the commit)"
SAID = {"Receiving: train": DOWNLOAD, "Received successfully": TO_CLIENTAPP}
SAID |= {"Sending: train": UPLOAD, "Sent successfully": SLEEPS}
"""What begins when a SuperNode says it."""

Stay = tuple[float, float, str]
"""Begin, end, stage."""


def chain_of(result: Found) -> dict[str, float]:
    """Return the median seconds of every stage, over rounds and sites; of two SuperNodes, each has its stages."""
    found, sites = list[dict[str, float]](), [stays_of(result, site) for site in range(len(result["sites"]))]
    for begin, end in list(pairwise(at_s + result["epoch_s"] for at_s in result["commits"]))[2:]:

        def ends(stays: list[Stay], begin: float = begin, end: float = end) -> list[float]:
            return [last for _, last, stage in stays if stage == UPLOAD and begin <= last < end]

        last = max((s for lanes in sites for stays in lanes.values() for s in ends(stays)), default=begin)
        for lanes in sites:
            chain = {}
            for lane, stays in lanes.items():
                prefix = "" if lane == "both" else f"{lane}: "
                chain[f"{prefix}(exchanges)"] = float(len(ends(stays)))
                for stage in STAGES:
                    of_it = [stay for stay in stays if stay[2] == stage]
                    chain[prefix + stage] = sum(max(0.0, min(b, end) - max(a, begin)) for a, b, _ in of_it)
            found.append(chain | {COMMIT: end - last})
    return {name: median(chain[name] for chain in found) for name in found[0]} if found else {}


def stays_of(result: Found, client_id: int) -> dict[str, list[Stay]]:
    """Return what each SuperNode of a site did, one thing after the other."""
    site, epoch_s, found = result["sites"][client_id], result["epoch_s"], {}
    couriers = [json.loads(line) for line in site["couriers"].splitlines()]
    computing = sorted(
        (start + epoch_s, start + epoch_s + seconds)
        for owner, name, start, seconds, _ in result["spans"]
        if owner == client_id and name == "computing"
    )
    for lane, log in site["supernodes"].items():
        lines = log.splitlines()
        marks = [(float(line.split()[0]), SAID[what]) for what in SAID for line in lines if re.search(what, line)]
        for stamp in couriers:
            if stamp["carries"] == lane:
                marks += [(stamp["entered_s"], TRAINER), (stamp["left_s"], TO_SUPERNODE)]
        stays = list[Stay]()
        for (begin, stage), (end, _) in pairwise(sorted(marks)):
            for first, last in computing if stage == TRAINER else ():  # tell the computation from the rest
                first, last = max(first, begin), min(last, end)
                if first < last:
                    stays += [(begin, first, TRAINER), (first, last, COMPUTATION)]
                    begin = last
            stays.append((begin, end, stage))
        found[lane] = stays
    return found


# -- a deployment
ROLES, APP = (kit.ABOUT["flower"][key] for key in ("roles", "app"))


class Deployment:
    """Everything that runs while one scenario is measured."""

    def __init__(self, stack: ExitStack, folder: Path, wanted: Wanted) -> None:
        folder.mkdir(parents=True)
        self._stack, self._folder, self._wanted = stack, folder, wanted
        self.links = [Link(wanted.lane, i, wanted.up_mbps, wanted.down_mbps) for i in range(wanted.sites)]
        self.output, self.peaks, port = folder / "result.json", dict[str, int](), 8765 + wanted.lane
        self._settings = {SETTINGS: json.dumps(asdict(wanted) | {"output": str(self.output)})}
        keys = folder / "keys" if wanted.secure else None
        if keys is not None:
            make_keys(keys, wanted.sites, ["127.0.0.1", *(link.gateway for link in self.links)])
        files = ServerFiles(folder / "home", keys and keys / "server", f"127.0.0.1:{port}")
        processes.write_connection(files)
        for link in self.links:
            link.lay(stack)
        env = server_environment(files.home, {**self._settings, "PARABLOCK_FLOWER_ROLE": "server"})
        command = processes.superlink_command(replace(files, address=f"0.0.0.0:{port}"))
        superlink = self._launch("superlink", command, env)
        processes.wait_for_port(files.address, superlink, folder / "superlink.log")
        if keys is not None:
            processes.register_sites(files)
        self.swallower = Swallower(self.links[0].gateway, port) if wanted.disturbance == DISTURBANCES[2] else None
        for link in self.links:
            self._start_site(link, keys, self.swallower.port if self.swallower else port)
        (folder / "app").mkdir()
        (folder / "app" / "pyproject.toml").write_text(APP, encoding="utf-8")
        self._run_id, self._is_over = processes.submit(files, folder / "app"), threading.Event()
        threading.Thread(target=self._watch_memory, daemon=True).start()
        stack.callback(self._is_over.set)

    def result(self, meanwhile: Callable[[Deployment], None]) -> Found:
        """Wait for the end of the run; return what the server wrote, and what the sites' processes noted."""
        give_up, log = time.monotonic() + PATIENCE_S, self._folder / "superlink.log"
        while not self.output.exists():
            has_ended = re.search(rf"Finished task \d+ of run {self._run_id}", log.read_text(errors="replace"))
            if (has_ended or time.monotonic() > give_up) and not self.output.exists():
                sys.exit(f"the run {'ended without a result' if has_ended else 'takes too long'}; look at {log}")
            meanwhile(self)
            time.sleep(0.5)
        found: Found = json.loads(self.output.read_text())
        found["sites"] = []
        for link in self.links:
            state, lanes = self._folder / f"site-{link.site}", LANES[self._wanted.supernodes]
            logs = {lane: Path(f"{state}-{lane}.log").read_text(errors="replace") for lane in lanes}
            found["sites"].append({"supernodes": logs, "couriers": (state / "couriers.jsonl").read_text()})
        return found

    def _start_site(self, link: Link, keys: Path | None, port: int) -> None:
        state = self._folder / f"site-{link.site}"
        state.mkdir()
        for place, carries in enumerate(LANES[self._wanted.supernodes]):
            superlink, own_port = f"{link.gateway}:{port}", 9100 + 10 * place + link.site
            own_keys = keys and keys / state.name
            command = [*link.inside, *supernode_command(superlink, own_keys, state, own_port, carries)]
            command[command.index("--node-config") + 1] += f' state="{state}" client-id={link.site}'
            around = processes.site_environment if self._wanted.warm else processes.environment
            home = self._folder / f"home-{link.site}-{carries}"
            self._launch(f"{state.name}-{carries}", command, around(home, self._settings))

    def _launch(self, name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
        log = self._folder / f"{name}.log"
        threading.Thread(target=stamp_lines, args=(process.stdout, log), daemon=True).start()

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
        mark = f"FLWR_HOME={self._folder}".encode()
        while not self._is_over.wait(0.5):
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # it has just ended
                    if mark in (process / "environ").read_bytes():
                        self._note_peak(process)

    def _note_peak(self, process: Path) -> None:
        words = [(process / "comm").read_text().strip()]
        words += [Path(part).name for part in (process / "cmdline").read_text(errors="replace").split("\0")[:3]]
        peaks = re.findall(r"VmHWM:\s+(\d+)", (process / "status").read_text())
        for role in [role for name, role in ROLES.items() if name in words][:1]:
            self.peaks[role] = max([self.peaks.get(role, 0), *(1024 * int(peak) for peak in peaks)])


def stamp_lines(source: IO[bytes], path: Path) -> None:
    with path.open("w", buffering=1) as log:
        for line in source:
            log.write(f"{time.time():.3f} {line.decode(errors='replace')}")


class Link:
    """A site's network: the server's end in our namespace, the site's end in one of its own."""

    def __init__(self, lane: int, site: int, up_mbps: float, down_mbps: float) -> None:
        name, self.site, self._up_mbps, self._down_mbps = f"{lane}-{site}", site, up_mbps, down_mbps
        self._namespace, self._outer, self._inner = f"parablock{name}", f"pbo{name}", f"pbi{name}"
        self.gateway, self.inside = f"10.77.{8 * lane + site}.1", ["ip", "netns", "exec", self._namespace]

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
            if mbps:
                shape = ("rate", f"{mbps:g}mbit", "burst", "256kb", "latency", "200ms")
                call(*inside, "tc", "qdisc", "add", "dev", device, "root", "tbf", *shape)
        call(*self.inside, "ip", "link", "set", "lo", "up")

    def cut(self, seconds: float) -> None:
        """Take the link down for so long."""
        call("ip", "link", "set", self._outer, "down")
        time.sleep(seconds)
        call("ip", "link", "set", self._outer, "up")

    def moved(self) -> tuple[int, int]:
        """Return the bytes that went up and down so far, headers and all."""
        counts = Path("/sys/class/net") / self._outer / "statistics"
        up, down = (int((counts / name).read_text()) for name in ("rx_bytes", "tx_bytes"))
        return up, down


def call(*command: str) -> None:
    subprocess.run(command, check=True)


class Swallower:
    """Stands before a server; with a `direction` it loses the next large answer up, or breaks one off down."""

    def __init__(self, host: str, target: int) -> None:
        self._target, self.swallowed, self.direction = target, 0, ""
        self._listener = socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                site, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                since = {"up": 0, "down": 0}
                for ends, way in (((site, server), "up"), ((server, site), "down")):
                    threading.Thread(target=self._pump, args=(*ends, since, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, since: dict[str, int], way: str) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                if way == "down" and self.direction and since[self.direction] > 1 << 18:  # it carries a part
                    self.direction = ""
                    self.swallowed += 1
                    break
                since[way] += len(piece)
                since["down" if way == "up" else "up"] = 0
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


BENCHMARKS = benchmarks(globals())

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
