"""Settings that are right by themselves and cannot work together, found all at once.

The rules read a configuration as plain values, so that they can be applied to any that is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from parablock.config.methods import METHODS, NO_MEAN, OWNERS, cohort_size

Problem = tuple[str, str]
"""The dotted path of a key, and what is wrong with its value."""

NOT_ON_A_GRID = ("kill", "nan", "sign_flip", "scale")
"""Faults that take a client's keys away, or that words of a grid cannot have."""

MIN_UPDATES = {"mean": 1, "median": 3, "trimmed_mean": 3, "krum": 3}


def conflicts(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[Problem]:
    """List what cannot work together.

    Args:
        config: Every section with all its values.
        chosen: The same without what is at its default.
    """
    return [
        *_sites(config),
        *_aggregation(config["federation"]),
        *_auto(config),
        *_method(config["federation"]["method"], chosen),
        *_noise(config),
        *_secure(config),
        *_too_few(config["federation"]),
        *_faults(config),
    ]


def refuse_conflicts(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Raise every conflict at once, each at its key.

    Raises:
        ValidationError: There is one.
    """
    found = conflicts(config, chosen)
    if found:
        raise ValidationError.from_exception_data(
            "configuration",
            [
                {
                    "type": PydanticCustomError("conflict", "{problem}", {"problem": problem}),
                    "loc": tuple(key.split(".")),
                    "input": None,
                }
                for key, problem in found
            ],
        )


def _sites(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Clients at sites may bring rows of their own, and have no faults but real ones."""
    deployed = config["engine"]["name"] == "flower"
    if not config["data"]["train"] and not (deployed and config["data"]["test"]):
        yield (
            "data.train",
            "names no file; only a server whose sites bring their own rows (engine.name: flower) can do without, "
            "and then data.test says what it scores the model on",
        )
    if deployed and config["faults"]:
        yield "faults", "are made in one process only; with engine.name: flower pull a real plug"


def _aggregation(federation: Mapping[str, Any]) -> Iterator[Problem]:
    """A rule needs enough updates to tell a minority from the others."""
    rule, size = federation["aggregation"], cohort_size(federation)
    if not METHODS[federation["method"]].averages:
        return
    if size < MIN_UPDATES[rule]:
        yield "federation.aggregation", f"{rule} needs {MIN_UPDATES[rule]} clients in a round; there are {size}"
    elif rule == "trimmed_mean" and int(federation["trim_fraction"] * size) == 0:
        yield (
            "federation.trim_fraction",
            f"cuts nobody of the {size} clients of a round; give at least {1 / size:.3g}, or more clients",
        )
    elif rule == "krum" and size < 2 * federation["assumed_attackers"] + 3:
        yield (
            "federation.assumed_attackers",
            f"krum needs 2·f + 3 clients in a round to withstand f attackers; there are {size}: "
            f"at most {(size - 3) // 2} can be assumed",
        )


def _auto(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Blocks that fit the link need a link with a speed, and a number of steps to hide it under."""
    key = "blocks.layers_per_block"
    if config["blocks"]["layers_per_block"] != "auto":
        return
    if config["link"]["upload_mbps"] is None and config["link"]["download_mbps"] is None:
        yield key, "auto fits the blocks to the link; give link.upload_mbps and link.download_mbps, or a number"
    if config["engine"]["name"] == "flower":
        yield (
            key,
            "auto rests on how fast a machine is, and each site would choose for itself; give the number that "
            "`parablock plan` shows",
        )
    if config["train"]["num_local_steps"] == "auto":
        yield key, "auto follows from train.num_local_steps, which is auto too; give a number for one of them"


def _method(name: str, chosen: Mapping[str, Any]) -> Iterator[Problem]:
    """What has no effect with a method, or cannot be had with it."""
    method = METHODS[name]
    for owned in (key for key in OWNERS if key not in method.own_keys):
        for key, _ in _within(chosen, owned):
            yield key, f"takes effect with {', '.join(OWNERS[owned])} only, not with {name}"
    no_mean = NO_MEAN[method.combines]
    for part, has_effect, why in (
        ("blocks", method.trains == "blocks", "which trains no blocks"),
        ("federation.participation", method.gathers, no_mean),
        ("federation.aggregation", method.averages, no_mean),
        ("federation.server_optimizer", method.combines == "mean", no_mean),
        ("privacy", method.averages, no_mean),
    ):
        for key, _ in _within(chosen, part) if not has_effect else ():
            if key != "blocks.layers_path":  # it says where the layers are
                yield key, f"has no effect with method {name}, {why}; leave it out"
    for refused, reason in method.refuses.items():
        for key, value in _within(chosen, refused):
            yield key, f"{value} {reason}"


def _within(chosen: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """List a key with its value where it was chosen; of a section, all keys that were."""
    section, _, name = key.partition(".")
    values = chosen.get(section, {})
    return [(f"{section}.{each}", value) for each, value in values.items() if name in ("", each)]


def _noise(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What noise hides, and what would let it through."""
    privacy, rule = config["privacy"], config["federation"]["aggregation"]
    if privacy["noise_multiplier"] > 0 and privacy["mode"] == "central" and rule != "mean":
        yield (
            "privacy.noise_multiplier",
            f"the server's noise hides a client in a mean, not in a {rule}; choose federation.aggregation: mean, "
            "or privacy.mode: local",
        )
    if privacy["clip_norm"] is not None and config["wire"]["error_feedback"]:
        yield (
            "wire.error_feedback",
            "would send later what privacy.clip_norm bounds now; switch one of them off",
        )


def _secure(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What a sum of which nobody sees a part cannot be combined with."""
    privacy, federation, wire = config["privacy"], config["federation"], config["wire"]
    if privacy["secure_aggregation"] == "none" or not METHODS[federation["method"]].averages:
        return
    how = f"privacy.secure_aggregation: {privacy['secure_aggregation']}"
    if privacy["clip_norm"] is None:
        yield (
            "privacy.clip_norm",
            f"{how} needs it, for the grid's step; give a norm that few updates reach",
        )
    if privacy["noise_multiplier"] > 0 and privacy["mode"] == "local":
        yield "privacy.mode", f"local noise leaves the grid of {how}; choose central"
    if federation["aggregation"] != "mean":
        yield "federation.aggregation", f"{federation['aggregation']} looks at single updates; {how} hides them"
    if wire["streaming"]:
        yield "wire.streaming", f"with {how} no part of a sum is known before all of it is; set it to false"
    if wire["format"] != "float32":
        yield "wire.format", f"{how} sends words of 32 bits in place of {wire['format']}; leave it at float32"
    if cohort_size(federation) < 3:
        yield "federation.num_clients", f"{how} needs 3 clients in a round; there are {cohort_size(federation)}"
    for place, fault in enumerate(config["faults"]):
        if fault["kind"] in NOT_ON_A_GRID:
            yield f"faults.{place}.kind", f"{fault['kind']} cannot happen with {how}"


def _too_few(federation: Mapping[str, Any]) -> Iterator[Problem]:
    """A commit cannot need more updates than are asked for."""
    size = cohort_size(federation)
    if federation["min_updates"] > size:
        yield (
            "federation.min_updates",
            f"{federation['min_updates']} of {size} updates: so many are asked for in a round",
        )


def _faults(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A fault has to be able to happen."""
    federation = config["federation"]
    if config["faults"] and config["engine"]["name"] != "inprocess":
        yield "faults", "happen with engine.name: inprocess only; real processes can be killed for real"
    for place, fault in enumerate(config["faults"]):
        if fault["client"] >= federation["num_clients"]:
            yield f"faults.{place}.client", f"there is no client {fault['client']} of {federation['num_clients']}"
        if fault["round"] >= federation["num_rounds"]:
            yield f"faults.{place}.round", f"there is no round {fault['round']} of {federation['num_rounds']}"
