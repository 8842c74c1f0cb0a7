"""A link that breaks for 20 seconds in the middle of a transfer, with real sockets, and what is sent again for it.

SuperLink, SuperNodes and trainers are real processes. Between the server and one site stands a slow proxy. A cut
ends every connection there at once, and new ones find nobody for 20 s. The model is the small pretrained one in two
blocks of 11.6 MB, and chunks are as large as they are by default. One run is not cut, one in the middle of
updates on their way up, one in the middle of new values on their way down: what more crosses the proxy than without
a cut was sent again. All have to end with the model of one process.

Needs the extra `flower`.

    .venv/bin/python benchmarks/cut_link.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from _deployed import Watched, deployed_config, in_one_process
from _record import REPOSITORY, Bar, fresh_folder, generated, make_console, make_parser, record, t0, table
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.deploy.one_machine import Deployment

sys.path.append(str(REPOSITORY / "tests" / "support"))
from cuttable_proxy import PIECE, CuttableProxy

SITES = 2
IDLE_S = 0.5
"""A direction in which less than a piece has moved for so long carries no transfer."""

Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console, folder = make_console(), fresh_folder(options)
    config = deployed_config(
        generated(folder / "material", num_clients=SITES) if options.smoke else t0(),
        sites=SITES,
        rounds=options.rounds,
        seed=options.seed,
        chunk_bytes=options.chunk_bytes,
        layers_per_block=4,
    )
    expected = in_one_process(config, folder / "one-process")
    results: Found = {
        "model_sha256": expected,
        "another_seed": in_one_process(config, folder / "another-seed", seed=options.seed + 1),
    }
    blocks = json.loads((folder / "one-process" / "manifest.json").read_text(encoding="utf-8"))["blocks"]
    block_bytes = results["block_bytes"] = 4 * max(block["parameters"] for block in blocks)
    for name, direction in (("undisturbed", ""), ("up", "up"), ("down", "down")):
        results[name] = over_a_proxy(config, folder / name, options, direction, block_bytes)
        console.print(f"{name}: {results[name]}")
    bars = []
    for direction in ("up", "down"):
        again = results[direction][direction] - results["undisturbed"][direction]
        cuts = results[direction]["cuts"]
        results[direction]["again_bytes_per_cut"] = again / max(1, cuts)
        bars += [
            Bar(f"cuts in the middle of a transfer {direction}", cuts, options.cuts, at_most=False),
            Bar(f"bytes sent again {direction} for a cut / chunk", again / max(1, cuts) / options.chunk_bytes, 1),
        ]
    same = sum(results[name]["model_sha256"] == expected for name in ("undisturbed", "up", "down"))
    bars.append(Bar("runs that end with the model of one process", same, 3, at_most=False))
    bars.append(Bar("runs of another seed that do", float(results["another_seed"] == expected), 0))
    show(console, results)
    record(options, results, bars, config=config.model_dump(mode="json"), console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("cut_link", "Cut a real link in the middle of transfers.", "--cuts 3 --outage-s 40")
    parser.add_argument("--cuts", type=int, default=2, help="cuts in each direction, in one run")
    parser.add_argument("--outage-s", type=float, default=20.0, help="how long each lasts, seconds")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of a run")
    parser.add_argument(
        "--transfer-s", type=float, default=5.0, help="how long a block should take on one connection, seconds"
    )
    parser.add_argument(
        "--chunk-bytes", type=int, default=4 << 20, help="bytes of a chunk; the default of wire.chunk_bytes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    options = parser.parse_args()
    if options.smoke:
        options.cuts, options.outage_s, options.rounds, options.transfer_s = 1, 2.0, 4, 3.0
        options.chunk_bytes = 131_072
    return options


class BehindAProxy(Deployment):
    """A deployment whose site 0 reaches the server through a proxy of so many bytes per second."""

    def __init__(self, directory: Path, bytes_per_s: float) -> None:
        super().__init__(directory, SITES)
        self._bytes_per_s = bytes_per_s

    def start_supernode(self, client_id: int, superlink: str | None = None) -> None:
        """Start a site's process, that of site 0 towards the proxy."""
        if client_id == 0:
            self.proxy = CuttableProxy(int(self.files.address.rpartition(":")[2]), self._bytes_per_s)
            superlink = f"127.0.0.1:{self.proxy.port}"
        super().start_supernode(client_id, superlink)


def over_a_proxy(
    config: RunConfig, directory: Path, options: argparse.Namespace, direction: str, block_bytes: int
) -> Found:
    """Run with one site behind the proxy; cut it in the middle of transfers in this direction."""
    deployment = BehindAProxy(directory, block_bytes / options.transfer_s)
    deployment.prepare(config)
    with deployment:
        proxy = deployment.proxy
        began = time.monotonic()
        with Watched(deployment) as watched:
            for _ in range(options.cuts if direction else 0):
                if wait_for_the_middle(watched, proxy, direction, block_bytes):
                    proxy.cut(options.outage_s)
        seconds = time.monotonic() - began
        cuts, moved = proxy.cuts, {"up": proxy.up, "down": proxy.down}
        proxy.close()
    if watched.error is not None:
        raise watched.error
    return {
        "cuts": cuts,
        **moved,
        "seconds": seconds,
        "rounds_done": watched.summary["rounds_done"],
        "model_sha256": watched.summary["model_sha256"],
    }


def wait_for_the_middle(watched: Watched, proxy: CuttableProxy, direction: str, block_bytes: int) -> bool:
    """Wait until half of a block has moved since the direction was idle; False when the run has ended before."""
    start, last, last_s, idle = 0, getattr(proxy, direction), time.monotonic(), False

    def is_in_the_middle() -> bool:
        nonlocal start, last, last_s, idle
        moved, now_s = getattr(proxy, direction), time.monotonic()
        if moved - last >= PIECE:
            last, last_s = moved, now_s
        elif now_s - last_s > IDLE_S:
            start, last, last_s, idle = moved, moved, now_s, True
        return idle and moved - start > block_bytes / 2

    return watched.wait_for(is_in_the_middle)


def show(console: Console, results: Found) -> None:
    made = table(
        "A link that breaks", "run", "cuts", "MB up", "MB down", "sent again for a cut, kB", "s", "the same"
    )
    for name in ("undisturbed", "up", "down"):
        row = results[name]
        again = f"{row['again_bytes_per_cut'] / 1e3:.0f}" if "again_bytes_per_cut" in row else ""
        same = "yes" if row["model_sha256"] == results["model_sha256"] else "NO"
        moved = (f"{row[way] / 1e6:.2f}" for way in ("up", "down"))
        made.add_row(name, str(row["cuts"]), *moved, again, f"{row['seconds']:.0f}", same)
    console.print(made)


if __name__ == "__main__":
    main()
