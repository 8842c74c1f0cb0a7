"""Where each second of a round over Flower goes, from what every process of the chain noted of its time."""

from __future__ import annotations

import json
import re
import statistics
from itertools import pairwise
from typing import Any

SLEEPS = "nothing for the SuperNode: the server takes, folds, hands over; the SuperNode sleeps"
DOWNLOAD = "download: link to SuperNode"
TO_CLIENTAPP = "SuperNode to ClientApp, which polls"
TRAINER = "courier and trainer, without the computation"
COMPUTATION = "computation, and encoding"
TO_SUPERNODE = "hashing, ClientApp to SuperNode, which polls"
UPLOAD = "upload: SuperNode to link"
STAGES = (SLEEPS, DOWNLOAD, TO_CLIENTAPP, TRAINER, COMPUTATION, TO_SUPERNODE, UPLOAD)
"""What a SuperNode, which does one thing at a time, does with a round; together they are the round."""

EXCHANGES = "(exchanges)"
COMMIT = "(the server: from the last byte of the last site to the commit)"
SAID = {
    "Receiving: train": DOWNLOAD,
    "Received successfully": TO_CLIENTAPP,
    "Sending: train": UPLOAD,
    "Sent successfully": SLEEPS,
}
"""What begins when a SuperNode says it."""

Chain = dict[str, float]
Stay = tuple[float, float, str]
"""Begin, end, stage."""


def chain_of(result: dict[str, Any]) -> Chain:
    """Give the median seconds of every stage, over rounds and sites; of two SuperNodes, each has its stages.

    Args:
        result: Of `Deployment.result`, at delay 0. The first two rounds are left out.
    """
    epoch_s, found = result["epoch_s"], list[Chain]()
    rounds = list(pairwise(commit + epoch_s for commit in result["commits"]))[2:]
    sites = [_stays(result, client_id) for client_id in range(len(result["sites"]))]
    for begin, end in rounds:
        sent = [s for lanes in sites for stays in lanes.values() for s in _ends(stays, UPLOAD, begin, end)]
        last = max(sent, default=begin)
        for lanes in sites:
            chain = {COMMIT: end - last}
            for lane, stays in lanes.items():
                prefix = "" if lane == "both" else f"{lane}: "
                chain[prefix + EXCHANGES] = len(_ends(stays, UPLOAD, begin, end))
                for stage in STAGES:
                    chain[prefix + stage] = sum(_shared(stay, begin, end) for stay in stays if stay[2] == stage)
            found.append(chain)
    names = [name for name in found[0] if name != COMMIT] + [COMMIT] if found else []
    return {name: statistics.median(chain[name] for chain in found) for name in names}


def _stays(result: dict[str, Any], client_id: int) -> dict[str, list[Stay]]:
    """Give what each SuperNode of a site did, one thing after the other."""
    site, epoch_s = result["sites"][client_id], result["epoch_s"]
    couriers = [json.loads(line) for line in site["couriers"].splitlines()]
    computing = [
        (start + epoch_s, start + epoch_s + seconds, COMPUTATION)
        for owner, name, start, seconds, _ in result["spans"]
        if owner == client_id and name == "computing"
    ]
    found = {}
    for lane, log in site["supernodes"].items():
        marks = [(time, stage) for what, stage in SAID.items() for time in _stamps(log, what)]
        for stamp in couriers:
            if stamp["carries"] == lane:
                marks += [(stamp["entered_s"], TRAINER), (stamp["left_s"], TO_SUPERNODE)]
        marks.sort()
        stays = [(begin, end, stage) for (begin, stage), (end, _) in pairwise(marks)]
        found[lane] = [part for stay in stays for part in _without(stay, computing)]
    return found


def _without(stay: Stay, computing: list[Stay]) -> list[Stay]:
    """Tell the computation from what else a courier stays for."""
    begin, end, stage = stay
    if stage != TRAINER:
        return [stay]
    parts = list[Stay]()
    for first, last, _ in sorted(computing):
        first, last = max(first, begin), min(last, end)
        if first < last:
            parts += [(begin, first, TRAINER), (first, last, COMPUTATION)]
            begin = last
    return [*parts, (begin, end, TRAINER)]


def _shared(stay: Stay, begin: float, end: float) -> float:
    """Give how much of a stay lies between two commits."""
    return max(0.0, min(stay[1], end) - max(stay[0], begin))


def _ends(stays: list[Stay], stage: str, begin: float, end: float) -> list[float]:
    """Give when stays of a stage ended between two commits."""
    return [last for _, last, name in stays if name == stage and begin <= last < end]


def _stamps(log: str, what: str) -> list[float]:
    return [float(line.split(maxsplit=1)[0]) for line in log.splitlines() if re.search(what, line)]
