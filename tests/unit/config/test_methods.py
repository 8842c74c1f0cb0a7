"""The rows of methods: what each has to say, and what follows from a row that nobody has written yet."""

from __future__ import annotations

from typing import Any

import pytest

from parablock.config.conflicts import conflicts
from parablock.config.keys import RunConfig
from parablock.config.load import known_keys, parse_config
from parablock.config.methods import METHODS, OWNERS, Method, cohort_size, with_delay
from parablock.training.block_optimizer import GRADIENT_TERMS
from parablock.training.trainer import local_arguments


@pytest.mark.parametrize("name", METHODS)
def test_a_row_does_not_contradict_itself(name: str) -> None:
    method = METHODS[name]
    assert method.title and method.summary.endswith(".")
    assert bool(method.source) == method.sends, "a bound is not published"
    assert (method.trains == "adapters") == bool(method.matrices) == ("lora" in method.own_keys)
    assert method.without_delay is None or method.may_lag
    assert {*method.own_keys, *method.refuses} <= {*known_keys()}


def test_a_term_of_the_gradient_is_a_key_of_some_method_and_weighs_in_it_alone() -> None:
    assert {f"federation.{name}" for name in GRADIENT_TERMS} <= OWNERS.keys()
    assert local_arguments(config_of("fedprox", proximal_mu=0.5)).gradient_terms == {"proximal_mu": 0.5}
    assert local_arguments(config_of("fedavg")).gradient_terms == {}


def test_a_method_and_the_same_without_delay_are_one() -> None:
    names = ("parablock", "fl_bcd", "fedavg", "flora")
    assert [with_delay(name) for name in names] == ["parablock", "parablock", "fedavg", None]


def test_a_group_that_every_round_trains_is_told_from_groups_in_turn() -> None:
    always = {name for name, method in METHODS.items() if method.trains_one_group}
    assert always == {"fedavg", "fedprox", "fedit", "ffa_lora", "flora", "local", "central"}
    assert {name for name, method in METHODS.items() if method.matrices and not method.trains_one_group} == {
        "rolora"
    }
    assert config_of("rolora").schedule == "cyclic" != config_of("parablock").schedule


def test_the_delay_is_1_with_parablock_alone_where_none_is_given() -> None:
    assert {name: config_of(name).federation.delay for name in METHODS} == {
        name: int(name == "parablock") for name in METHODS
    }


def test_one_client_is_asked_where_clients_take_turns_or_all_data_is_in_one() -> None:
    sizes = {name: cohort_size({"method": name, "participation": 0.5, "num_clients": 8}) for name in METHODS}
    assert {name for name, size in sizes.items() if size == 1} == {"fedcybgd", "central"}
    assert {size for size in sizes.values() if size != 1} == {4}


MADE_UP: dict[str, tuple[dict[str, Any], list[str]]] = {
    "averages adapters": ({"trains": "adapters", "own_keys": ("lora",)}, ["blocks", "federation.proximal_mu"]),
    "stacks": (
        {"trains": "blocks", "combines": "stack"},
        [
            *("federation.aggregation", "federation.proximal_mu", "federation.server_optimizer", "lora.rank"),
            "privacy.clip_norm",
        ],
    ),
    "has a key of its own": (
        {"trains": "everything", "own_keys": ("federation.proximal_mu",)},
        ["blocks", "lora.rank"],
    ),
    "sends nothing": (
        {"trains": "blocks", "combines": "nothing", "refuses": {"train.optimizer_state": "is lost"}},
        [
            *("federation.aggregation", "federation.participation", "federation.proximal_mu"),
            *("federation.server_optimizer", "lora.rank", "privacy.clip_norm", "train.optimizer_state"),
        ],
    ),
    "asks one client": (
        {"trains": "blocks", "asks": "one_in_turn"},
        [
            *("federation.aggregation", "federation.participation", "federation.proximal_mu", "lora.rank"),
            "privacy.clip_norm",
        ],
    ),
}


@pytest.mark.parametrize("case", MADE_UP)
def test_what_is_refused_follows_from_a_row(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traits, refused = MADE_UP[case]
    monkeypatch.setitem(METHODS, "gossip", Method(title="Gossip", source="", summary="", **traits))
    chosen: dict[str, Any] = {
        "blocks": {"schedule": "cyclic", "layers_path": "model.layers"},
        "federation": {
            "participation": 0.5,
            "server_optimizer": {"name": "adam"},
            "aggregation": "median",
            "proximal_mu": 0.5,
        },
        "lora": {"rank": 4},
        "train": {"optimizer_state": "keep"},
        "privacy": {"clip_norm": 1.0},
    }
    config = config_of("parablock").model_dump()
    config["federation"] |= chosen["federation"] | {"method": "gossip", "delay": 0}
    found = conflicts(config, chosen)
    keys = [key if key != "blocks.schedule" else "blocks" for key, _ in found]
    assert sorted(keys) == refused


def config_of(method: str, **federation: Any) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": ["rows"]},
            "federation": {"method": method, **federation},
        }
    )
