"""Where each second of an exchange through Flower goes, from what every process of the chain noted of its time."""

from __future__ import annotations

import json
import re
import statistics
from itertools import pairwise
from typing import Any

STAGES = (
    ("the server packs, hashes and hands over; the SuperNode polls", "announced"),
    ("download: link to SuperNode", "downloaded"),
    ("ClientApp: what is left of its start, and of its copies", "entered"),
    ("courier to trainer, which reads it", "computing"),
    ("computation, and encoding", "computed"),
    ("trainer to courier, and packing", "packed"),
    ("hashing, ClientApp to SuperNode, which polls", "announced back"),
    ("upload: SuperNode to link", "uploaded"),
    ("the server takes the last of it", "replied"),
    ("waiting for the slowest site", "all replied"),
    ("aggregation, until the next request", "round"),
)
"""What the seconds up to each mark of an exchange go to; delay 0, where one follows the other."""

Chain = dict[str, float]


def chain_of(result: dict[str, Any]) -> Chain:
    """Give the median seconds of every stage, over rounds and sites.

    Args:
        result: Of `Deployment.result`. A round that took more than one exchange is left out, and the first.
    """
    found: list[Chain] = []
    sites = [_Site(result, client_id) for client_id in range(len(result["sites"]))]
    epoch_s = result["epoch_s"]
    for committed, next_commit in pairwise(commit + epoch_s for commit in result["commits"][1:]):
        marks = [site.marks(committed, next_commit) for site in sites]
        whole = [mark for mark in marks if mark is not None]
        if len(whole) != len(sites):
            continue
        last = max(mark["replied"] for mark in whole)
        for mark in whole:
            begin = mark.pop("pushed")
            mark |= {"all replied": last, "round": begin + next_commit - committed}
            stage = {}
            for name, end in STAGES:
                stage[name] = mark[end] - begin
                begin = mark[end]
            stage["(ClientApp: from the start of its process to its first line)"] = mark["start"]
            found.append(stage)
    return {name: statistics.median(stage[name] for stage in found) for name in found[0]} if found else {}


class _Site:
    """What was noted of one site's exchanges."""

    def __init__(self, result: dict[str, Any], client_id: int) -> None:
        site, epoch_s = result["sites"][client_id], result["epoch_s"]
        logs, couriers = site["supernodes"], [json.loads(line) for line in site["couriers"].splitlines()]
        down, up = ("both", "both") if "both" in logs else ("down", "up")
        self._announced = _stamps(logs[down], "Receiving: train")
        self._downloaded = _stamps(logs[down], "Received successfully")
        self._sending, self._sent = _stamps(logs[up], "Sending: train"), _stamps(logs[up], "Sent successfully")
        self._entered = [stamp for stamp in couriers if stamp["carries"] == down]
        self._left = [stamp["left_s"] for stamp in couriers if stamp["carries"] == up]
        spans = [span for span in result["spans"] if span[0] == client_id]
        self._down, self._computing, self._up = (
            [
                (start + epoch_s, start + epoch_s + seconds)
                for _, name, start, seconds, _ in spans
                if name == activity
            ]
            for activity in ("downloading", "computing", "uploading")
        )

    def marks(self, begin: float, end: float) -> Chain | None:
        """Give the times of the only exchange between two commits; None: there was not exactly one."""

        def only(times: list[Any], key: Any = lambda time: time) -> list[Any]:
            return [time for time in times if begin <= key(time) < end]

        kinds = [
            only(self._down, lambda span: span[0]),
            only(self._announced),
            only(self._downloaded),
            only(self._entered, lambda stamp: stamp["entered_s"]),
            only(self._left),
            only(self._computing, lambda span: span[0]),
            only(self._sending),
            only(self._sent),
            only(self._up, lambda span: span[1]),
        ]
        if any(len(times) != 1 for times in kinds):
            return None
        (down,), (announced,), (downloaded,), (courier,), (left,), (computing,), (sending,), (sent,), (up,) = kinds
        return {
            "pushed": down[0],
            "announced": announced,
            "downloaded": downloaded,
            "entered": max(courier["entered_s"], downloaded),
            "start": courier["entered_s"] - courier["started_s"],
            "computing": computing[0],
            "computed": computing[1],
            "packed": left,
            "announced back": sending,
            "uploaded": sent,
            "replied": up[1],
        }


def _stamps(log: str, what: str) -> list[float]:
    return [float(line.split(maxsplit=1)[0]) for line in log.splitlines() if re.search(what, line)]
