"""Settings that cannot work together, or would have no effect, are refused at their key."""

from __future__ import annotations

import pytest

from dotted import REQUIRED, nested, parsed, problems
from parablock.config.conflicts import conflicts
from parablock.config.load import parse_config, tree_of_method
from parablock.config.methods import cohort_size
from parablock.config.section import NOT_BUILT
from parablock.experiment.engines import client_plan, encoding_of, update_form

# What this version refuses together, by the key that the refusal names.
NOT_BUILT_YET = {
    "federation.excluded_clients": {
        "federation.num_clients": 4,
        "federation.excluded_clients": [1],
        "engine.name": "remote",
    },
}


# Built or not, these would change nothing as they stand.
WITHOUT_EFFECT = {
    "data.partition.alpha": ({"data.partition.alpha": 0.1}, "dirichlet"),
    "data.test_fraction": ({"data.test_fraction": 0.2, "data.test": ["test.jsonl"]}, "where `test` is empty"),
    "federation.server_optimizer learning_rate": ({"federation.server_optimizer.learning_rate": 0.5}, "name none"),
    "federation.server_optimizer momentum": ({"federation.server_optimizer.momentum": 0.5}, "name none"),
    "privacy mode": ({"privacy.mode": "local"}, "noise_multiplier above 0"),
    "privacy delta": ({"privacy.clip_norm": 1.0, "privacy.delta": 1e-6}, "noise_multiplier above 0"),
    "privacy noise_multiplier": ({"privacy.noise_multiplier": 1.0}, "needs clip_norm"),
    "federation trim_fraction": ({"federation.trim_fraction": 0.3}, "trimmed_mean only"),
    "federation assumed_attackers": ({"federation.assumed_attackers": 2}, "krum only"),
    "federation max_client_examples": (
        {"federation.max_client_examples": 9, "federation.aggregation": "median"},
        "mean only",
    ),
    "federation.max_client_examples": (
        {"federation.max_client_examples": 9, "privacy.clip_norm": 1.0, "privacy.noise_multiplier": 1.0},
        "counts once",
    ),
    "federation.proximal_mu": ({"federation.proximal_mu": 0.5}, "fedprox only"),
    "federation.participation": ({"federation.method": "local", "federation.participation": 0.5}, "never meet"),
    "federation.aggregation": ({"federation.method": "fedcybgd", "federation.aggregation": "median"}, "never meet"),
    "federation.server_optimizer": (
        {"federation.method": "central", "federation.server_optimizer.name": "adam"},
        "sends nothing",
    ),
    "lora.rank": ({"lora.rank": 4}, "fedit, ffa_lora"),
    "train min_local_steps": ({"train.min_local_steps": 2}, "num_local_steps: auto only"),
    "train max_local_steps": ({"train.max_local_steps": 9}, "num_local_steps: auto only"),
    "train adam_beta1": (
        {"federation.method": "fedit", "train.optimizer": "muon", "train.adam_beta1": 0.8},
        "where muon steps adapters",
    ),
    "wire rounding": ({"wire.rounding": "nearest"}, "not with float32"),
    "wire error_feedback": ({"wire.error_feedback": True}, "not with float32"),
    "wire density": ({"wire.density": 0.01, "wire.format": "int4"}, "sparse2 only"),
    "wire residual_decay": ({"wire.residual_decay": 0.95, "wire.format": "int4"}, "error_feedback: true only"),
    "wire.chunk_bytes": ({"wire.chunk_bytes": 65536, "wire.streaming": False}, "streaming: true only"),
    "engine.step_time_s": ({"engine.step_time_s": 0.1}, "virtual"),
}


def test_problems_that_join_sections_come_once_the_sections_are_right():
    values = {"data.partition.scheme": "by_file", "federation.num_clients": 3}
    (problem,) = problems(values)
    assert "data.train has 1 and federation.num_clients is 3" in problem
    assert parse_config(nested({**REQUIRED, **values, "federation.num_clients": 1})).federation.num_clients == 1


def test_sites_that_would_choose_their_own_blocks_are_refused():
    fitting = parsed(blocks__layers_per_block="auto", link__upload_mbps=10).model_dump()
    assert conflicts(fitting, {}) == []
    fitting["engine"]["name"] = "flower"
    ((key, problem),) = conflicts(fitting, {})
    assert key == "blocks.layers_per_block" and "sites would differ" in problem


NO_DELAY = {
    "fl_bcd": "is parablock without one",
    "flora": "makes no mean",
    "fedcybgd": "has clients take turns",
    "local": "sends nothing",
    "central": "sends nothing",
}


@pytest.mark.parametrize("method", NO_DELAY)
def test_a_method_without_delay_refuses_one_with_the_reason(method: str):
    (problem,) = problems({"federation.method": method, "federation.delay": 1})
    assert problem.startswith(f"federation: method {method} has delay 0, not 1: it {NO_DELAY[method]}")
    assert "choose parablock or fedavg" in problem


def test_a_group_that_is_always_in_flight_has_no_server_optimizer():
    momentum = {"federation.delay": 1, "federation.server_optimizer.name": "momentum"}
    (problem,) = problems({"federation.method": "fedit", **momentum})
    assert problem.startswith("federation.server_optimizer: momentum") and "always has in flight" in problem
    for fitting in ({"federation.method": "fedit", "federation.delay": 0}, {"federation.method": "rolora"}, {}):
        parse_config(nested({**REQUIRED, **momentum, **fitting}))
    (problem,) = problems({"federation.method": "rolora", **momentum, "federation.delay": 2})
    assert "set federation.delay: 1" in problem, "with two groups in turn the one that is trained is not in flight"


def test_a_rule_and_a_share_count_the_clients_that_are_not_excluded():
    three = {"federation.num_clients": 3, "federation.aggregation": "median"}
    (problem,) = problems({**three, "federation.excluded_clients": [2]})
    assert problem == "federation.aggregation: median needs 3 clients in a round; there are 2"
    parse_config(nested({**REQUIRED, **three, "federation.num_clients": 4, "federation.excluded_clients": [2]}))
    share = {"federation.num_clients": 4, "federation.excluded_clients": [2], "federation.in_flight": "share"}
    config = parse_config(nested({**REQUIRED, **share}))
    assert client_plan(config, update_form(config), None).num_updates == 3
    (problem,) = problems({**share, "federation.participation": 0.5})
    assert problem.startswith("federation.excluded_clients: ") and "choose mean" in problem


def test_a_method_without_blocks_refuses_what_is_said_of_them():
    fedavg = {"federation.method": "fedavg", "federation.delay": 0}
    found = problems({**fedavg, "blocks.layers_per_block": 2, "blocks.schedule": "cyclic"})
    assert {problem.split(":")[0] for problem in found} == {"blocks.layers_per_block", "blocks.schedule"}
    assert all("no effect with method fedavg" in problem and "leave it out" in problem for problem in found)
    kept = parsed(federation__method="fedavg", blocks__layers_path="model.layers")  # it says where the layers are
    assert kept.blocks.layers_path == "model.layers"
    assert parsed(federation__method="fl_bcd", blocks__layers_per_block=2).blocks.layers_per_block == 2


def test_what_would_do_nothing_is_refused():
    for method in ("local", "central"):
        alone = {"federation.method": method, "federation.delay": 0}
        idle = {"wire.format": "int8", "federation.deadline_factor": 2.0, "federation.in_flight": "own"}
        found = problems({**alone, **idle})
        assert {problem.split(":")[0] for problem in found} == set(idle)
        assert all("has no effect with" in problem and "leave it out" in problem for problem in found)
    (problem,) = problems(
        {"federation.method": "fedcybgd", "federation.delay": 0, "federation.deadline_factor": 2.0}
    )
    assert problem.startswith("federation.deadline_factor: has no effect with method fedcybgd, where one client")
    fedit = {"federation.method": "fedit", "federation.in_flight": "own"}
    (problem,) = problems({**fedit, "federation.delay": 0})
    assert problem.startswith("federation.in_flight: has no effect with a delay of 0")
    config = parse_config(nested({**REQUIRED, **fedit, "federation.delay": 1, "wire.format": "int8"}))
    assert config.federation.in_flight == "own"
    parse_config(nested({**REQUIRED, **fedit, "federation.delay": 0, "federation.in_flight": "aligned"}))
    for name, delay in (("fedit", 0), ("local", 0)):  # what takes its place in a comparison
        other = parse_config(tree_of_method(config, name, delay))
        assert other.federation.in_flight == "aligned" and (other.wire.format == "int8") is (name == "fedit")


def test_a_part_of_the_clients_is_fewer_than_all():
    (problem,) = problems({"federation.num_clients": 3, "federation.participation": 0.9})
    assert problem.startswith("federation.participation: 0.9 of 3 clients are all of them in every round; ")
    assert "give at most 0.667, or leave it out" in problem
    for clients in (*range(2, 40), 200, 1000, 2000, 30_000):
        share = {"federation.num_clients": clients, "federation.participation": 1 - 1e-9}
        (problem,) = problems(share)
        most = float(problem.split("give at most ")[1].split(",")[0])
        config = parse_config(nested({**REQUIRED, **share, "federation.participation": most}))
        assert cohort_size(config.federation.model_dump()) == clients - 1


@pytest.mark.parametrize("key", NOT_BUILT_YET)
def test_what_is_not_built_is_refused_and_says_so(key: str):
    (problem,) = problems(NOT_BUILT_YET[key])
    assert problem.startswith(f"{key}: {NOT_BUILT}")
    without = {other: value for other, value in NOT_BUILT_YET[key].items() if other != key}
    parse_config(nested({**REQUIRED, **without}))


def test_all_that_stacked_adapters_leave_no_room_for_is_said_at_once():
    asked = {
        "federation.aggregation": "median",
        "federation.server_optimizer.name": "momentum",
        "privacy.clip_norm": 1.0,
        "wire.error_feedback": True,
        "wire.streaming": False,
        "train.optimizer_state": "keep",
    }
    found = problems({"federation.method": "flora", "federation.delay": 0, "wire.format": "int8", **asked})
    keys = ["federation.aggregation", "federation.server_optimizer", *list(asked)[2:]]
    assert [problem.partition(":")[0] for problem in found] == keys
    assert all("flora" in problem for problem in found)
    asked |= {"federation.method": "fedit", "federation.delay": 0, "wire.format": "int8"}
    parse_config(nested({**REQUIRED, **asked, "wire.error_feedback": False}))


SPARSE = {"federation.method": "fedavg", "federation.delay": 1, "wire.format": "sparse2"}


def test_sparse_updates_have_feedback_and_a_mean_of_groups_that_come_back_in_every_round():
    config = parse_config(nested({**REQUIRED, **SPARSE, "wire.density": 0.01, "wire.residual_decay": 0.97}))
    assert config.wire.error_feedback
    assert encoding_of(config).format == "sparse2-41" and encoding_of(config).residual_decay == 0.97
    for method in ("parablock", "fl_bcd", "rolora", "fedcybgd"):
        (problem,) = problems({"federation.method": method, "wire.format": "sparse2"})
        assert problem.startswith(
            f"wire.format: sparse2 leaves most of an update to the next round, and method {method}"
        )
        assert "one of fedavg, fedit, ffa_lora, fedprox" in problem
    (problem,) = problems({"federation.method": "local", "wire.format": "sparse2"})
    assert problem.startswith("wire.format: has no effect with method local")
    (problem,) = problems({**SPARSE, "wire.error_feedback": False})
    assert "would lose what sparse2 does not send" in problem
    refused = {"federation.aggregation": "median", "privacy.clip_norm": 1.0}
    found = problems({**SPARSE, **refused})
    assert [problem.partition(":")[0] for problem in found] == ["wire.format", "federation.aggregation"]
    masked = {"privacy.secure_aggregation": "masked", "privacy.clip_norm": 1.0, "wire.streaming": False}
    assert sum("masks need the same" in problem for problem in problems({**SPARSE, **masked})) == 1


CONFLICTS = {
    "privacy.clip_norm": ({"federation.method": "local", "federation.delay": 0, "privacy.clip_norm": 1.0}, "local"),
    "privacy.noise_multiplier": (
        {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 1.0, "federation.aggregation": "median"},
        "not in a median",
    ),
    "wire.error_feedback": (
        {"privacy.clip_norm": 1.0, "wire.error_feedback": True, "wire.format": "int8"},
        "privacy.clip_norm",
    ),
    "federation.aggregation": ({"federation.aggregation": "median", "federation.num_clients": 2}, "there are 2"),
    "federation.trim_fraction": ({"federation.aggregation": "trimmed_mean", "federation.num_clients": 4}, "0.25"),
    "federation.assumed_attackers": ({"federation.aggregation": "krum", "federation.num_clients": 4}, "at most 0"),
}


def test_all_that_a_sum_without_parts_cannot_be_combined_with_is_said_at_once():
    found = problems(
        {
            "privacy.secure_aggregation": "masked",
            "federation.aggregation": "median",
            "federation.num_clients": 3,
            "federation.participation": 0.67,
            "wire.format": "int8",
        }
    )
    assert [problem.partition(":")[0] for problem in found] == [
        *("federation.aggregation", "privacy.clip_norm", "wire.streaming", "wire.format", "federation.num_clients")
    ]
    assert all("privacy.secure_aggregation: masked" in problem for problem in found[1:])
    works = {"privacy.secure_aggregation": "masked", "privacy.clip_norm": 1.0, "wire.streaming": False}
    parse_config(nested({**REQUIRED, **works, "privacy.noise_multiplier": 1.0}))
    (problem,) = problems({**works, "privacy.noise_multiplier": 1.0, "privacy.mode": "local"})
    assert problem.startswith("privacy.mode: local noise leaves the grid")
    distributed = {"privacy.noise_multiplier": 1.0, "privacy.mode": "distributed"}
    parse_config(nested({**REQUIRED, **works, **distributed}))
    for how in ("plain", "none"):
        (problem,) = problems({**works, **distributed, "privacy.secure_aggregation": how})
        assert problem.startswith("privacy.mode: distributed: each client adds a part of the noise")
    for noise in (0.009, 1001.0):
        (problem,) = problems({**works, **distributed, "privacy.noise_multiplier": noise})
        assert problem.startswith("privacy.noise_multiplier: distributed noise is between 0.01 and 1000")


@pytest.mark.parametrize("key", CONFLICTS)
def test_settings_that_cannot_work_together_are_refused_at_their_key(key: str):
    values, needed = CONFLICTS[key]
    (problem,) = problems(values)
    assert problem.startswith(f"{key}: ")
    assert needed in problem


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_an_option_that_would_have_no_effect_is_refused(key: str):
    values, needed = WITHOUT_EFFECT[key]
    (problem,) = problems(values)
    section, _, name = key.replace(" ", ".").rpartition(".")
    assert section in problem
    assert name in problem
    assert needed in problem


DROP = {"client": 0, "round": 0, "at": "train", "kind": "drop"}
WRONG_FAULTS = {
    "no client": ({"client": 8}, "faults.0.client: there is no client 8 of 8"),
    "no round": ({"round": 64}, "faults.0.round: there is no round 64 of 64"),
    "a kind elsewhere": ({"at": "commit", "kind": "nan"}, "there is no nan at commit"),
    "no value": ({"kind": "delay"}, "delay at train needs a value: seconds"),
    "a value too many": ({"kind": "nan", "value": 2}, "has no effect with nan"),
    "no such key": ({"vlaue": 2}, "faults.0.vlaue: unknown key; known here: client, round, at, kind, value"),
    "before it began": ({"kind": "kill", "value": -1}, "at least 0, not -1"),
}


@pytest.mark.parametrize("case", WRONG_FAULTS)
def test_a_fault_that_cannot_happen_is_refused(case: str):
    fault, words = WRONG_FAULTS[case]
    (problem,) = problems({"faults": [{**DROP, **fault}]})
    assert words in problem


def test_a_commit_cannot_need_more_updates_than_are_asked_for():
    (problem,) = problems({"federation.min_updates": 3, "federation.participation": 0.25})
    assert problem == "federation.min_updates: is 3, but a round asks for 2; give at most 2"
    assert parsed(federation__min_updates=8).federation.min_updates == 8
