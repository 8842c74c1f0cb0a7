"""Settings that are right by themselves and cannot work together, found all at once.

The rules read a configuration as plain values, so that they can be applied to any that is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from parablock.config.methods import BLOCK_METHODS, LORA_METHODS, SOLO_METHODS, cohort_size
from parablock.config.section import NOT_BUILT

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
    method = config["federation"]["method"]
    return [
        *_sites(config),
        *_aggregation(config["federation"]),
        *_blocks(method, chosen.get("blocks", {})),
        *_auto(config),
        *_method(method, chosen.get("federation", {}), chosen.get("lora", {})),
        *_stacked(config, chosen),
        *_noise(config),
        *_secure(config),
        *_nothing_to_protect(method, chosen.get("privacy", {})),
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
    deployed, method = config["engine"]["name"] == "flower", config["federation"]["method"]
    if not config["data"]["train"] and not (deployed and config["data"]["test"]):
        yield (
            "data.train",
            "names no file; only a server whose sites bring their own rows (engine.name: flower) can do without, "
            "and then data.test says what it scores the model on",
        )
    if deployed and method in SOLO_METHODS:
        yield "engine.name", f"flower has nothing to carry with {method}, which sends nothing; use inprocess"
    if deployed and config["faults"]:
        yield "faults", "are made in one process only; with engine.name: flower pull a real plug"


def _aggregation(federation: Mapping[str, Any]) -> Iterator[Problem]:
    """A rule needs enough updates to tell a minority from the others."""
    rule, size = federation["aggregation"], cohort_size(federation)
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


def _blocks(method: str, chosen: Mapping[str, Any]) -> Iterator[Problem]:
    """Where no blocks are trained, nothing can be said of them but where the layers are."""
    if method not in BLOCK_METHODS:
        for key in chosen:
            if key != "layers_path":
                yield f"blocks.{key}", f"has no effect with method {method}, which trains no blocks; leave it out"


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


def _method(method: str, federation: Mapping[str, Any], lora: Mapping[str, Any]) -> Iterator[Problem]:
    """What belongs to other methods."""
    for key in lora if method not in LORA_METHODS else ():
        yield f"lora.{key}", f"takes effect with {', '.join(LORA_METHODS)} only, not with {method}"
    if method != "fedprox" and "proximal_mu" in federation:
        yield "federation.proximal_mu", f"takes effect with fedprox only, not with {method}"
    if method in (*SOLO_METHODS, "fedcybgd"):
        for key in ("participation", "aggregation"):
            if key in federation:
                yield f"federation.{key}", f"has no effect with {method}, whose updates never meet; leave it out"
    if method in SOLO_METHODS and "server_optimizer" in federation:
        yield "federation.server_optimizer", f"has no effect with {method}, which sends nothing; leave it out"


def _stacked(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> Iterator[Problem]:
    """What stacked adapters, of which no mean is made and which nobody keeps, leave no room for."""
    if config["federation"]["method"] != "flora":
        return
    stacks = "flora, which stacks the adapters of all clients and makes no mean of them; leave it out"
    for key in ("aggregation", "server_optimizer"):
        if key in chosen.get("federation", {}):
            yield f"federation.{key}", f"has no effect with {stacks}"
    for key in chosen.get("privacy", {}):
        yield f"privacy.{key}", f"protects a mean of updates, not those of {stacks}"
    if config["wire"]["format"] != "float32":
        yield "wire.format", f"{config['wire']['format']} {NOT_BUILT} for flora, whose adapters travel as float32"
    if "chunk_bytes" in chosen.get("wire", {}):
        yield "wire.chunk_bytes", "has no effect with flora: a stack goes down whole; leave it out"
    if config["train"]["optimizer_state"] == "keep":
        yield "train.optimizer_state", "keep has nothing to keep with flora, whose adapters are new in each round"
    if config["engine"]["name"] == "flower":
        yield (
            "engine.name",
            f"flower {NOT_BUILT} for flora: every site would multiply the stack itself, and another processor may "
            "round it differently; use inprocess",
        )


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
    if privacy["secure_aggregation"] == "none" or federation["method"] in (*SOLO_METHODS, "fedcybgd"):
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


def _nothing_to_protect(method: str, privacy: Mapping[str, Any]) -> Iterator[Problem]:
    """Where updates never meet, there is no mean to hide in."""
    for key in privacy if method in (*SOLO_METHODS, "fedcybgd") else ():
        yield f"privacy.{key}", f"takes no effect with {method}, whose updates never meet; leave it out"


def _too_few(federation: Mapping[str, Any]) -> Iterator[Problem]:
    """A commit cannot need more updates than are asked for."""
    size = 1 if federation["method"] in ("fedcybgd", "central") else cohort_size(federation)
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
