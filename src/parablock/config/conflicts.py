"""Conflicts: settings that are right by themselves and cannot work together, found all at once in plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from parablock.config.methods import (
    METHODS,
    NO_MEAN,
    OWNERS,
    cohort_size,
    fewest_asked,
    may_fit_blocks,
    without_effect,
)
from parablock.config.section import NOT_BUILT

Problem = tuple[str, str]
"""The dotted path of a key, and the problem with its value."""

NOT_ON_A_GRID = ("kill", "nan", "sign_flip", "scale")
"""Faults that lose a client's keys, or that fixed-point words cannot have."""

DISTRIBUTED_NOISE = (0.01, 1000.0)
"""The least and the largest `noise_multiplier` that clients can share out on the grid of words."""

MIN_UPDATES = {"mean": 1, "median": 3, "trimmed_mean": 3, "krum": 3}
"""The fewest updates of each aggregation rule."""


def conflicts(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[Problem]:
    """List the conflicts of a configuration with all values; `chosen` has those that differ from their default."""
    return [
        *_sites(config),
        *_aggregation(config["federation"]),
        *_weights(config),
        *_auto(config),
        *_method(config["federation"], chosen, is_sparse=_is_sparse(config)),
        *_overlap(config["federation"]),
        *_optimizer(config, chosen),
        *_noise(config),
        *_sparse(config),
        *_secure(config),
        *_too_few(config["federation"]),
        *_excluded(config),
        *_faults(config),
    ]


def refuse_conflicts(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Raise one ValidationError with every conflict, each at its key."""
    errors = [
        InitErrorDetails(
            type=PydanticCustomError("conflict", "{problem}", {"problem": problem}),
            loc=tuple(key.split(".")),
            input=None,
        )
        for key, problem in conflicts(config, chosen)
    ]
    if errors:
        raise ValidationError.from_exception_data("configuration", errors)


def _sites(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Clients at sites may have rows of their own; injected faults happen in one process only."""
    deployed = config["engine"]["name"] != "inprocess"
    if not config["data"]["train"] and not (deployed and config["data"]["test"]):
        yield "data.train", "names no file; sites may have rows of their own (engine.name: remote, and data.test)"
    if deployed and config["faults"]:
        yield "faults", "happen with engine.name: inprocess only; at sites, kill real processes"


def _aggregation(federation: Mapping[str, Any]) -> Iterator[Problem]:
    """A robust rule needs enough updates to tell a minority from the others."""
    rule, size = federation["aggregation"], fewest_asked(federation)
    if not METHODS[federation["method"]].averages:
        return
    if size < MIN_UPDATES[rule]:
        yield "federation.aggregation", f"{rule} needs {MIN_UPDATES[rule]} clients in a round; there are {size}"
    elif rule == "trimmed_mean" and int(federation["trim_fraction"] * size) == 0:
        least = f"set at least {1 / size:.3g}, or more clients"
        yield "federation.trim_fraction", f"cuts none of the {size} clients of a round; {least}"
    elif rule == "krum" and size < 2 * federation["assumed_attackers"] + 3:
        yield (
            "federation.assumed_attackers",
            f"krum withstands f attackers of 2·f + 3 clients; of {size} in a round at most {(size - 3) // 2}",
        )


def _weights(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A cap of weights needs weights."""
    federation, privacy = config["federation"], config["privacy"]
    why = ""
    if federation["aggregation"] != "mean":
        why = f"it is for aggregation: mean only, {federation['aggregation']} counts every client once"
    elif METHODS[federation["method"]].combines == "nothing" or fewest_asked(federation) < 2:
        why = "a round makes nothing of several updates"
    elif privacy["secure_aggregation"] != "none" or (
        privacy["noise_multiplier"] > 0 and privacy["mode"] == "central"
    ):
        why = "with the server's noise and with secure_aggregation every client counts once"
    if federation["max_client_examples"] is not None and why:
        yield "federation.max_client_examples", f"has no effect: {why}; leave it out"


def _auto(config: Mapping[str, Any]) -> Iterator[Problem]:
    """`layers_per_block: auto` follows from the machine, and from a number of steps."""
    key = "blocks.layers_per_block"
    if config["blocks"]["layers_per_block"] != "auto" or may_fit_blocks(config):
        return
    if config["engine"]["name"] != "inprocess":
        yield key, "auto depends on the machine, and sites would differ; set 1: `parablock plan` then advises"
    if config["train"]["num_local_steps"] == "auto":
        yield key, "auto follows from train.num_local_steps, which is auto too; set a number for one of them"


def _method(federation: Mapping[str, Any], chosen: Mapping[str, Any], *, is_sparse: bool) -> Iterator[Problem]:
    """Settings without effect with a method and a delay, or that the method refuses."""
    name = federation["method"]
    method = METHODS[name]
    for owned in (key for key in OWNERS if key not in method.own_keys):
        for key, _ in _within(chosen, owned):
            yield key, f"takes effect with {', '.join(OWNERS[owned])} only, not with {name}"
    no_mean = NO_MEAN[method.combines]
    implied = ("blocks.layers_path", *["wire.error_feedback"] * is_sparse)  # always needed; part of sparse2
    for part, reason in without_effect(name, federation["delay"]).items():
        for key, _ in _within(chosen, part):
            if key not in implied:
                yield key, f"{reason}; leave it out, or give its default"
    for part, has_effect, why in (
        ("federation.participation", method.gathers, no_mean),
        ("federation.aggregation", method.averages, no_mean),
        ("federation.server_optimizer", method.combines == "mean", no_mean),
        ("privacy", method.averages, no_mean),
    ):
        for key, _ in _within(chosen, part) if not has_effect else ():
            yield key, f"has no effect with method {name}, {why}; leave it out"
    for refused, reason in method.refuses.items():
        for key, value in _within(chosen, refused):
            if key not in implied:
                yield key, f"{value} {reason}"


def _optimizer(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> Iterator[Problem]:
    """Muon steps every matrix, and adapters are matrices alone."""
    if config["train"]["optimizer"] == "muon" and METHODS[config["federation"]["method"]].trains == "adapters":
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if key in chosen.get("train", {}):
                yield f"train.{key}", "has no effect where muon steps adapters, which are matrices; leave it out"


def _overlap(federation: Mapping[str, Any]) -> Iterator[Problem]:
    """A group that is always in flight has no server optimizer: no client could foresee its moments."""
    name, delay, optimizer = federation["method"], federation["delay"], federation["server_optimizer"]["name"]
    method = METHODS[name]
    groups = len(method.matrices) or (1 if method.trains_one_group else delay + 1)  # of blocks: see `read_inputs`
    if optimizer != "none" and method.averages and delay >= groups:
        yield (
            "federation.server_optimizer",
            f"{optimizer} would add its moments to a group that method {name} always has in flight with delay "
            f"{delay}, and no client foresees them; leave it out, or set federation.delay: {groups - 1}",
        )


def _within(chosen: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """List a key with its value, or all keys of a section, as far as they were chosen."""
    section, _, name = key.partition(".")
    values = chosen.get(section, {})
    return [(f"{section}.{each}", value) for each, value in values.items() if name in ("", each)]


def _noise(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Noise protects a mean only, and no residual may bypass the clipping."""
    privacy, rule = config["privacy"], config["federation"]["aggregation"]
    if privacy["noise_multiplier"] > 0 and privacy["mode"] == "central" and rule != "mean":
        cure = "choose federation.aggregation: mean, or privacy.mode: local"
        yield "privacy.noise_multiplier", f"the server's noise hides a client in a mean, not in a {rule}; {cure}"
    if privacy["noise_multiplier"] > 0 and privacy["mode"] == "distributed":
        yield from _distributed(privacy["noise_multiplier"], privacy["secure_aggregation"])
    if privacy["clip_norm"] is not None and config["wire"]["error_feedback"] and not _is_sparse(config):
        yield "wire.error_feedback", "would send the residual past privacy.clip_norm; switch one of them off"


def _distributed(noise_multiplier: float, secure_aggregation: str) -> Iterator[Problem]:
    """A client's part of distributed noise hides it in a sum alone, and has to fit the words of one."""
    if secure_aggregation != "masked":
        how = "each client adds a part of the noise, which hides it in a masked sum alone"
        yield "privacy.mode", f"distributed: {how}; set privacy.secure_aggregation: masked, or mode: local"
    least, most = DISTRIBUTED_NOISE
    if not least <= noise_multiplier <= most:
        yield "privacy.noise_multiplier", f"distributed noise is between {least:g} and {most:g} on the words' grid"


def _is_sparse(config: Mapping[str, Any]) -> bool:
    return bool(config["wire"]["format"] == "sparse2")


def _sparse(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What a sparse update leaves out has to travel soon, in a mean of updates whose places differ."""
    privacy, federation = config["privacy"], config["federation"]
    method, key = METHODS[federation["method"]], "wire.format"
    if not _is_sparse(config) or key in method.refuses or not method.sends:
        return
    why = []
    if not method.averages or not method.trains_one_group:
        suited = ", ".join(name for name, each in METHODS.items() if each.averages and each.trains_one_group)
        why.append(
            f"leaves most of an update to the next round, and method {federation['method']} does not send the same "
            f"parameters in every round; choose int4, or one of {suited}"
        )
    if privacy["secure_aggregation"] != "none":
        why.append("sends other places for every client, and masks need the same; choose float32")
    elif privacy["clip_norm"] is not None:
        why.append("would send what earlier rounds kept back past privacy.clip_norm; choose another format")
    if why:
        yield key, f"sparse2 {'; and it '.join(why)}"
    if federation["aggregation"] != "mean":
        yield (
            "federation.aggregation",
            f"{federation['aggregation']} of sparse2 updates would be of zeros; choose mean",
        )


def _secure(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A secure sum is known as a whole or not at all."""
    privacy, federation, wire = config["privacy"], config["federation"], config["wire"]
    if privacy["secure_aggregation"] == "none" or not METHODS[federation["method"]].averages:
        return
    how = f"privacy.secure_aggregation: {privacy['secure_aggregation']}"
    if privacy["clip_norm"] is None:
        yield "privacy.clip_norm", f"{how} needs it, for the grid's step; set a norm that few updates reach"
    if privacy["noise_multiplier"] > 0 and privacy["mode"] == "local":
        cure = "distributed or central" if privacy["secure_aggregation"] == "masked" else "central"
        yield "privacy.mode", f"local noise leaves the grid of {how}; choose {cure}"
    if federation["aggregation"] != "mean":
        yield "federation.aggregation", f"{federation['aggregation']} looks at single updates; {how} hides them"
    if wire["streaming"]:
        yield "wire.streaming", f"with {how} no part of a sum is known before all of it is; set it to false"
    if wire["format"] not in ("float32", "sparse2"):
        yield "wire.format", f"{how} sends words of 32 bits in place of {wire['format']}; leave it at float32"
    if cohort_size(federation) < 3:
        yield "federation.num_clients", f"{how} needs 3 clients in a round; there are {cohort_size(federation)}"
    for place, fault in enumerate(config["faults"]):
        if fault["kind"] in NOT_ON_A_GRID:
            yield f"faults.{place}.kind", f"{fault['kind']} cannot happen with {how}"


def _too_few(federation: Mapping[str, Any]) -> Iterator[Problem]:
    """A commit cannot need more updates than a round asks for, and a part of the clients is fewer than all."""
    size = cohort_size(federation)
    if federation["min_updates"] > size:
        yield (
            "federation.min_updates",
            f"is {federation['min_updates']}, but a round asks for {size}; give at most {size}",
        )
    clients, share = federation["num_clients"], federation["participation"]
    if share < 1 and size == clients and METHODS[federation["method"]].gathers:
        digits = max(3, len(f"{clients}"))  # so that as many clients but one are drawn
        most = (
            f"give at most {(clients - 1) / clients:.{digits}g}, or leave it out" if clients > 1 else "leave it out"
        )
        yield "federation.participation", f"{share:g} of {clients} clients are all of them in every round; {most}"


def _excluded(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Clients may be excluded where enough others meet, and nothing is agreed on among all of them."""
    key, federation = "federation.excluded_clients", config["federation"]
    excluded, clients = set(federation["excluded_clients"]), federation["num_clients"]
    if not excluded:
        return
    if beyond := sorted(excluded - set(range(clients))):
        yield key, f"there is no client {beyond[0]} of {clients}"
    left = len(set(range(clients)) - excluded)
    if left < max(1, federation["min_updates"]):
        yield key, f"leaves {left} clients, and a round needs {max(1, federation['min_updates'])}"
    if federation["in_flight"] == "share" and federation["participation"] < 1:
        yield (
            key,
            "leaves rounds with numbers of clients that differ, of which in_flight: share needs one; choose mean",
        )
    if not METHODS[federation["method"]].gathers:
        yield key, f"{NOT_BUILT} for method {federation['method']}"
    if config["engine"]["name"] != "inprocess":
        yield key, f"{NOT_BUILT} for sites: their operators stay away, or `parablock deploy remove` removes one"
    if config["privacy"]["secure_aggregation"] != "none":
        how = config["privacy"]["secure_aggregation"]
        yield key, f"{NOT_BUILT} with privacy.secure_aggregation: {how}"


def _faults(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A fault needs an existing client and round."""
    federation = config["federation"]
    for place, fault in enumerate(config["faults"]):
        if fault["client"] >= federation["num_clients"]:
            yield f"faults.{place}.client", f"there is no client {fault['client']} of {federation['num_clients']}"
        if fault["round"] >= federation["num_rounds"]:
            yield f"faults.{place}.round", f"there is no round {fault['round']} of {federation['num_rounds']}"
