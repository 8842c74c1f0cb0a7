"""What Flower's chain costs, and how much of it ParaBlock hides: real SuperLink, SuperNodes and trainers.

Each site stands in a network namespace of its own, behind a link that `tc tbf` shapes in both directions; what
trains only takes time (a sleep), so that two cores can hold everything. "Exchange" is everything that is not
computation: Flower's polls, processes and copies, and the bytes. The wire alone is computed from the link.

Needs root, `ip` and `tc`, and the extra `flower`.

    .venv/bin/python benchmarks/flower.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from _flower_apps import SETTINGS
from _record import REPOSITORY, Bar, fresh_folder, make_console, make_parser, record, table

from parablock.deploy.keys import make_keys
from parablock.deploy.processes import (
    ServerFiles,
    environment,
    flower,
    register_sites,
    submit,
    superlink_command,
    wait_for_port,
    write_connection,
)

PORT = 8765
SCENARIOS = ("empty", "wire = compute", "covered")
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    os.environ["PYTHONPATH"] = python_path()  # Flower's commands look for the app in `_flower_apps.py`
    console = make_console()
    folder = fresh_folder(options)
    found = []
    for name, mega, compute_s, delay in scenarios(options):
        result = measure(folder / f"{len(found)}", options, mega=mega, compute_s=compute_s, delay=delay)
        found.append({"scenario": name, "megabytes": mega, "compute_s": compute_s, "delay": delay, **result})
        console.print(f"{name}, delay {delay}: {result['round_s']:.1f} s a round")
    shown = table("rounds over Flower", "scenario", "MB each way", "compute s", "delay", "round s", "exchange s")
    for row in found:
        shown.add_row(
            row["scenario"],
            f"{row['megabytes']:g}",
            f"{row['compute_s']:g}",
            str(row["delay"]),
            f"{row['round_s']:.1f}",
            f"{row['round_s'] - row['compute_s']:.1f}",
        )
    console.print(shown)
    record(
        options, found, bars(found, options), config={"mbps": options.mbps, "sites": options.sites}, console=console
    )


def scenarios(options: argparse.Namespace) -> list[tuple[str, float, float, int]]:
    if options.smoke:
        return [("empty", 0.004, 0.0, 0)]
    wire_s = 2 * options.megabytes * 8 / options.mbps
    chosen = [("empty", 0.004, 0.0, 0)]
    for _ in range(options.repeats):
        chosen += [("wire = compute", options.megabytes, wire_s, delay) for delay in (0, 1)]
    chosen += [("covered", options.megabytes, 2.5 * wire_s, delay) for delay in (0, 1)]
    return [scenario for scenario in chosen if scenario[0] in options.only]


def bars(found: list[Found], options: argparse.Namespace) -> list[Bar]:
    def rounds(scenario: str, delay: int) -> list[float]:
        return [row["round_s"] for row in found if row["scenario"] == scenario and row["delay"] == delay]

    made, wire_s = list[Bar](), 2 * options.megabytes * 8 / options.mbps
    if rounds("empty", 0):
        made.append(Bar("seconds of an empty exchange", statistics.median(rounds("empty", 0)), 5.0))
    if rounds("wire = compute", 1):
        serial, overlapped = (statistics.median(rounds("wire = compute", delay)) for delay in (0, 1))
        made.append(Bar("wire = compute: delay 1 / delay 0", overlapped / serial, 0.65))
        made.append(Bar("an exchange / its time on the wire", (serial - wire_s) / wire_s, 1.6))
    if rounds("covered", 1):
        serial, overlapped = (statistics.median(rounds("covered", delay)) for delay in (0, 1))
        made.append(Bar("covered: round / compute at delay 1", overlapped / (2.5 * wire_s), 1.06))
        made.append(Bar("covered: delay 1 / delay 0", overlapped / serial, 0.60))
    return made


def measure(folder: Path, options: argparse.Namespace, *, mega: float, compute_s: float, delay: int) -> Found:
    """Bring everything up, run the rounds, take everything down."""
    folder.mkdir(parents=True)
    wanted = {
        "elements": max(1, int(mega * 1e6 / 4)),
        "blocks": 3,
        "clients": options.sites,
        "rounds": options.rounds,
        "delay": delay,
        "compute_s": compute_s,
        "chunk_bytes": options.chunk_mib << 20,
        "output": str(folder / "result.json"),
    }
    more = {SETTINGS: json.dumps(wanted)}
    keys = None
    if not options.insecure:
        make_keys(
            folder / "keys", options.sites, ["127.0.0.1", *(gateway_of(site) for site in range(options.sites))]
        )
        keys = folder / "keys"
    files = ServerFiles(folder / "home", keys and keys / "server", f"127.0.0.1:{PORT}")
    write_connection(files)
    app = write_app(folder / "app")
    with ExitStack() as stack:
        gateways = [namespace(stack, site, options.mbps) for site in range(options.sites)]
        listening = ServerFiles(files.home, files.keys, f"0.0.0.0:{PORT}")
        env = environment(files.home, {**more, "PARABLOCK_FLOWER_ROLE": "server"})
        superlink = launch(stack, folder / "superlink.log", superlink_command(listening), env)
        wait_for_port(files.address, superlink, folder / "superlink.log")
        if keys is not None:
            register_sites(files)
        for site, gateway in enumerate(gateways):
            node = f'state="{folder / f"site-{site}"}" client-id={site}'
            command = ["ip", "netns", "exec", name_of(site), flower("flower-supernode")]
            command += ["--superlink", f"{gateway}:{PORT}", "--port", str(9100 + site), "--node-config", node]
            if keys is None:
                command.append("--insecure")
            else:
                command += ["--root-certificates", str(keys / f"site-{site}" / "ca.pem")]
                command += ["--auth-supernode-private-key", str(keys / f"site-{site}" / "site.key")]
            launch(stack, folder / f"site-{site}.log", command, environment(folder / f"home-{site}", more))
        submit(files, app)
        output = Path(wanted["output"])
        give_up = time.monotonic() + 120 + options.rounds * 8 * (compute_s + 40 * (mega > 1) + 20)
        while not output.exists():
            if time.monotonic() > give_up:
                sys.exit(f"no result in time; look at {folder}")
            time.sleep(0.5)
        time.sleep(0.5)
        result = json.loads(output.read_text())
    commits = result["commits"]
    between = [after - before for before, after in pairwise(commits)]
    return {"round_s": statistics.median(between[1:-1] or between), "rounds": between, "peak": result["peak_bytes"]}


def write_app(directory: Path) -> Path:
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


def namespace(stack: ExitStack, site: int, mbps: float) -> str:
    """Make a site's network with a shaped link; give the server's address on it."""
    name, outer, inner = name_of(site), f"pbo{site}", f"pbi{site}"
    gateway, address = gateway_of(site), f"10.77.{site}.2"
    ip("netns", "add", name)
    stack.callback(lambda: ip("netns", "del", name))
    ip("link", "add", outer, "type", "veth", "peer", "name", inner)
    stack.callback(lambda: ip("link", "del", outer))  # at once; with the namespace alone it goes when it likes
    ip("link", "set", inner, "netns", name)
    ip("addr", "add", f"{gateway}/24", "dev", outer)
    ip("link", "set", outer, "up")
    inside = ["ip", "netns", "exec", name]
    for command in (
        [*inside, "ip", "addr", "add", f"{address}/24", "dev", inner],
        [*inside, "ip", "link", "set", inner, "up"],
        [*inside, "ip", "link", "set", "lo", "up"],
        ["tc", "qdisc", "add", "dev", outer, *shape(mbps)],
        [*inside, "tc", "qdisc", "add", "dev", inner, *shape(mbps)],
    ):
        subprocess.run(command, check=True)
    return gateway


def shape(mbps: float) -> list[str]:
    return ["root", "tbf", "rate", f"{mbps:g}mbit", "burst", "256kb", "latency", "200ms"]


def gateway_of(site: int) -> str:
    return f"10.77.{site}.1"


def name_of(site: int) -> str:
    return f"parablock{site}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def launch(stack: ExitStack, log: Path, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    output = stack.enter_context(log.open("ab"))
    process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)

    def end() -> None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
    return process


def python_path() -> str:
    parts = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(part for part in parts if part)


def parse_options() -> argparse.Namespace:
    parser = make_parser("flower", "Rounds over real Flower processes and shaped links.", "--repeats 1")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=100.0, help="of a block, each way")
    parser.add_argument("--mbps", type=float, default=200.0)
    parser.add_argument("--chunk-mib", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=list(SCENARIOS), choices=SCENARIOS, help="these scenarios")
    parser.add_argument("--insecure", action="store_true", help="without TLS and node keys")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("network namespaces need root")
    return options


if __name__ == "__main__":
    main()
