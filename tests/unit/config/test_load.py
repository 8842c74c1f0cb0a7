"""The configuration: its surface is frozen here, and nothing that a user writes is ignored."""

from __future__ import annotations

import operator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from parablock.config.conflicts import conflicts
from parablock.config.keys import RunConfig
from parablock.config.load import known_keys, load_config, parse_config
from parablock.config.section import NOT_BUILT, Section
from parablock.errors import ConfigError

REQUIRED = {"model.name_or_path": "org/model", "data.train": ["train.jsonl"]}

# Every key with its default. Users' files and scripts rest on it: adding a line is a feature, changing or
# removing one breaks somebody and belongs into the CHANGELOG.
DEFAULTS = {
    **REQUIRED,
    "model.dtype": "float32",
    "model.device": "auto",
    "model.init": "pretrained",
    "data.test": [],
    "data.test_fraction": 0.1,
    "data.format": "auto",
    "data.max_length": 512,
    "data.partition.scheme": "iid",
    "data.partition.alpha": 0.5,
    "data.partition.field": None,
    "blocks.layers_per_block": 1,
    "blocks.split": "layer",
    "blocks.include_embeddings": False,
    "blocks.include_head": False,
    "blocks.schedule": "shuffled",
    "blocks.layers_path": None,
    "blocks.allow_unvisited": False,
    "federation.method": "parablock",
    "federation.num_clients": 8,
    "federation.participation": 1.0,
    "federation.num_rounds": 64,
    "federation.delay": 1,
    "federation.min_updates": 1,
    "federation.deadline_factor": None,
    "federation.in_flight": "aligned",
    "federation.server_optimizer.name": "none",
    "federation.server_optimizer.learning_rate": 1.0,
    "federation.server_optimizer.momentum": 0.9,
    "federation.proximal_mu": 0.01,
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "lora.target_modules": [],
    "federation.aggregation": "mean",
    "federation.stall_timeout_s": 600.0,
    "train.num_local_steps": 8,
    "train.min_local_steps": 1,
    "train.max_local_steps": 64,
    "train.per_device_train_batch_size": 8,
    "train.gradient_accumulation_steps": 1,
    "train.learning_rate": 1e-4,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_epsilon": 1e-8,
    "train.optimizer_state": "reset",
    "train.lr_scheduler_type": "constant",
    "train.warmup_ratio": 0.0,
    "train.gradient_checkpointing": False,
    "train.completion_only_loss": True,
    "wire.format": "float32",
    "wire.rounding": "stochastic",
    "wire.error_feedback": False,
    "wire.streaming": True,
    "wire.chunk_bytes": 4_194_304,
    "link.upload_mbps": None,
    "link.download_mbps": None,
    "link.latency_s": 0.0,
    "engine.name": "inprocess",
    "engine.clock": "real",
    "engine.num_threads": None,
    "engine.step_time_s": None,
    "evaluation.every_rounds": 8,
    "evaluation.max_examples": 256,
    "evaluation.per_device_eval_batch_size": 16,
    "checkpoint.every_rounds": 8,
    "checkpoint.keep": 2,
    "federation.trim_fraction": 0.2,
    "federation.assumed_attackers": 1,
    "privacy.clip_norm": None,
    "privacy.noise_multiplier": 0.0,
    "privacy.mode": "central",
    "privacy.delta": 1e-5,
    "privacy.secure_aggregation": "none",
    "faults": [],
    "report_to": [],
    "seed": 0,
}

# For every built key a value that is not its default, with what else it needs.
OTHER_VALUES: list[dict[str, Any]] = [
    {"model.dtype": "bfloat16"},
    {"model.device": "cpu"},
    {"model.init": "random"},
    {"data.test": ["test.jsonl"]},
    {"data.test_fraction": 0.2},
    {"data.format": "gsm8k"},
    {"data.max_length": 64},
    {"data.partition.scheme": "by_field", "data.partition.field": "label"},
    {"data.partition.scheme": "dirichlet", "data.partition.field": "label", "data.partition.alpha": 0.1},
    {"data.partition.field": "label"},  # the histogram counts by it
    {"blocks.layers_per_block": 2},
    {"blocks.layers_per_block": "auto", "link.upload_mbps": 10},
    {"blocks.split": "attention_mlp"},
    {"blocks.include_embeddings": True},
    {"blocks.include_head": True},
    {"blocks.schedule": "importance"},
    {"blocks.layers_path": "model.layers"},
    {"blocks.allow_unvisited": True},
    {"federation.num_clients": 3},
    {"federation.participation": 0.5},
    {"federation.num_rounds": 5},
    {"federation.delay": 2},
    {"federation.method": "fedavg", "federation.delay": 0},
    {"federation.in_flight": "own"},
    {"federation.server_optimizer.name": "adam", "federation.server_optimizer.learning_rate": 0.1},
    {"federation.server_optimizer.name": "momentum", "federation.server_optimizer.momentum": 0.5},
    {"federation.stall_timeout_s": 5.0},
    {"federation.min_updates": 2},
    {"federation.deadline_factor": 3.0},
    {"faults": [{"client": 2, "round": 7, "at": "upload", "kind": "drop", "value": 360.0}]},
    {"federation.aggregation": "median"},
    {"privacy.clip_norm": 2.0},
    {"privacy.clip_norm": 2.0, "wire.streaming": False, "privacy.secure_aggregation": "plain"},
    {"privacy.clip_norm": 2.0, "wire.streaming": False, "privacy.secure_aggregation": "masked"},
    {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 0.5, "privacy.delta": 1e-6},
    {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 0.5, "privacy.mode": "local"},
    {"federation.aggregation": "trimmed_mean", "federation.trim_fraction": 0.3},
    {"federation.aggregation": "krum", "federation.assumed_attackers": 2},
    {"train.num_local_steps": 4},
    {"train.num_local_steps": "auto", "train.min_local_steps": 2, "train.max_local_steps": 32},
    {"train.per_device_train_batch_size": 2},
    {"train.gradient_accumulation_steps": 4},
    {"train.learning_rate": 0.01},
    {"train.weight_decay": 0.1},
    {"train.max_grad_norm": 0.0},
    {"train.adam_beta1": 0.8},
    {"train.adam_beta2": 0.99},
    {"train.adam_epsilon": 1e-6},
    {"train.optimizer_state": "keep"},
    {"train.lr_scheduler_type": "cosine"},
    {"train.warmup_ratio": 0.1},
    {"train.gradient_checkpointing": True},
    {"train.completion_only_loss": False},
    {"wire.format": "bfloat16", "wire.error_feedback": True},
    {"wire.format": "int8", "wire.rounding": "nearest"},
    {"wire.format": "int4"},
    {"federation.method": "fedprox", "federation.delay": 0, "federation.proximal_mu": 0.5},
    {"federation.method": "fedit", "federation.delay": 0, "lora.rank": 4, "lora.alpha": 8.0},
    {"federation.method": "ffa_lora", "federation.delay": 0, "lora.target_modules": ["q_proj"]},
    {"federation.method": "flora", "federation.delay": 0},
    {"wire.streaming": False},
    {"wire.chunk_bytes": 65536},
    {"wire.format": "int2"},
    {"link.upload_mbps": 10.0},
    {"link.download_mbps": 10.0},
    {"link.latency_s": 0.1},
    {"engine.clock": "virtual", "engine.step_time_s": 0.1},
    {"engine.num_threads": 2},
    {"engine.name": "flower"},
    {
        "engine.name": "flower",
        "privacy.clip_norm": 2.0,
        "wire.streaming": False,
        "privacy.secure_aggregation": "masked",
    },
    {"evaluation.every_rounds": 0},
    {"evaluation.max_examples": 10},
    {"evaluation.per_device_eval_batch_size": 4},
    {"checkpoint.every_rounds": 0},
    {"checkpoint.keep": 1},
    {"report_to": ["tensorboard"]},
    {"seed": 3},
]

# What this version refuses together, by the key that the refusal names.
NOT_BUILT_YET = {
    "engine.name": {"federation.method": "flora", "federation.delay": 0, "engine.name": "flower"},
    "wire.format": {"federation.method": "flora", "federation.delay": 0, "wire.format": "bfloat16"},
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
    "wire rounding": ({"wire.rounding": "nearest"}, "not with float32"),
    "wire error_feedback": ({"wire.error_feedback": True}, "not with float32"),
    "wire.chunk_bytes": ({"wire.chunk_bytes": 65536, "wire.streaming": False}, "streaming: true only"),
    "engine.step_time_s": ({"engine.step_time_s": 0.1}, "virtual"),
}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        reduce(lambda section, part: section.setdefault(part, {}), sections, tree)[name] = value
    return tree


def parsed(**values: Any) -> RunConfig:
    """Parse the required keys and these, whose dots are written `__`."""
    return parse_config(nested({**REQUIRED, **{key.replace("__", "."): value for key, value in values.items()}}))


def flat(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    values = {key: reduce(operator.getitem, key.split("."), tree) for key in known_keys()}
    return {key: value for key, value in values.items() if not isinstance(value, dict)}


def problems(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(nested({**REQUIRED, **values}))
    assert caught.value.exit_code == 2
    return caught.value.problems


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MINIMAL = "model: {name_or_path: org/model}\ndata: {train: train.jsonl}\n"


# -- the surface ----------------------------------------------------------------------------------------------


def test_the_keys_and_their_defaults_are_those_that_users_rely_upon():
    assert flat(parsed()) == DEFAULTS


def test_every_section_is_listed_before_its_keys():
    keys = list(known_keys())
    assert len(keys) == len(set(keys))
    for key in keys:
        section = key.rpartition(".")[0]
        assert not section or keys.index(section) < keys.index(key)


def test_only_the_model_and_the_data_have_no_default():
    with pytest.raises(ConfigError) as caught:
        parse_config({})
    assert caught.value.problems == ("model: required and not given", "data: required and not given")
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {}, "data": {}})
    assert caught.value.problems == tuple(f"{key}: required and not given" for key in REQUIRED)


def test_every_key_has_a_description():
    def undescribed(section: type[BaseModel]) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found += undescribed(field.annotation)
            elif not field.description:
                found.append(f"{section.__name__}.{name}")
        return found

    assert undescribed(RunConfig) == []


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parsed().train.learning_rate = 1.0


# -- reading and writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", OTHER_VALUES, ids=lambda values: ",".join(values))
def test_what_is_written_is_what_is_read(values: dict[str, Any], tmp_path: Path):
    config = parse_config(nested({**REQUIRED, **values}))
    again = load_config(write(tmp_path / "config.yaml", config.to_yaml()))
    assert again == config != parsed()
    assert {key: flat(again)[key] for key in values} == values


def test_every_built_key_has_another_value_that_is_accepted():
    accepted = {key for values in OTHER_VALUES for key in values}
    untouched = set(DEFAULTS) - set(REQUIRED) - accepted
    assert not untouched


def test_one_file_may_stand_without_a_list():
    config = parsed(data__train="a.jsonl", data__test="b.jsonl")
    assert config.data.train == ("a.jsonl",)
    assert config.data.test == ("b.jsonl",)


def test_the_yaml_keeps_the_order_of_the_reference():
    assert list(yaml.safe_load(parsed().to_yaml())) == list(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.num_local_steps=4", "train.num_local_steps", 4),
        ("train.learning_rate=3e-4", "train.learning_rate", 3e-4),  # YAML 1.1 reads this as text
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing", True),
        ("data.test=[a.jsonl, b.jsonl]", "data.test", ["a.jsonl", "b.jsonl"]),
        ("federation.server_optimizer={name: adam}", "federation.server_optimizer.name", "adam"),
        ("link.upload_mbps=10", "link.upload_mbps", 10.0),
        ("seed=7", "seed", 7),
        (" seed = 7", "seed", 7),
    ],
)
def test_set_reads_the_value_as_yaml(override: str, key: str, value: Any, tmp_path: Path):
    config = load_config(write(tmp_path / "run.yaml", MINIMAL), [override])
    assert flat(config)[key] == value != DEFAULTS[key]


def test_set_goes_over_the_file_and_the_last_one_wins(tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL + "seed: 1\n")
    assert load_config(path).seed == 1
    assert load_config(path, ["seed=2"]).seed == 2
    assert load_config(path, ["seed=2", "seed=3"]).seed == 3


def test_set_can_clear_a_value_of_the_file(tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL + "link: {upload_mbps: 5}\n")
    assert load_config(path).link.upload_mbps == 5
    assert load_config(path, ["link.upload_mbps=null"]).link.upload_mbps is None


def test_set_fills_a_section_that_the_file_leaves_empty(tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL + "train:\n")
    assert load_config(path, ["train.num_local_steps=4"]).train.num_local_steps == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "is not key=value"),
        ("=3", "is not key=value"),
        ("data.test=[a", "is not YAML"),
        ("seed.more=1", "seed is a value, not a section"),
        ("train.num_local_step=4", "`train.num_local_steps`"),
    ],
)
def test_a_set_that_cannot_be_is_an_error_that_names_it(override: str, said: str, tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL + "seed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert said in str(caught.value)
    assert override.partition("=")[0].split(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "is not YAML"),
        ("- model\n- data\n", "must hold sections"),
        ("", "must hold sections"),
        ("model: tiny\ndata: {train: a.jsonl}\n", "model: "),
        ("seed: 1\nseed: 2\n", "seed"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_an_error_that_names_it(text: str, said: str, tmp_path: Path):
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_key_given_twice_is_an_error_that_names_its_line(tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL + "train:\n  learning_rate: 0.1\n  learning_rate: 0.2\n")
    with pytest.raises(ConfigError, match=r"learning_rate.*twice.*line 5"):
        load_config(path)


def test_anchors_and_merge_keys_of_yaml_work(tmp_path: Path):
    text = MINIMAL + "link: &fast {upload_mbps: 5, download_mbps: 5}\n"
    assert load_config(write(tmp_path / "run.yaml", text)).link.upload_mbps == 5
    path = write(tmp_path / "merged.yaml", "model: &m {name_or_path: a}\ndata: {train: a}\n<<: {seed: 4}\n")
    assert load_config(path).seed == 4


# -- problems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.num_local_step", "`train.num_local_steps`"),
        ("train.lr", None),
        ("train.batch_size", "`train.per_device_train_batch_size`"),
        ("trian", "`train`"),
        ("learning_rate", "learning_rate`"),
        ("federation.server_optimiser", "`federation.server_optimizer`"),
        ("federation.server_optimizer.beta", None),
        ("wire.learning_rate", "`federation.server_optimizer.learning_rate`"),
        ("data.partition.aplha", "`data.partition.alpha`"),
        ("zzz", None),
    ],
)
def test_an_unknown_key_names_the_nearest_or_all_of_its_section(key: str, nearest: str | None):
    (problem,) = problems({key: 1})
    assert problem.startswith(f"{key}: unknown key")
    if nearest:
        assert nearest in problem
    else:
        section = key.rpartition(".")[0]
        siblings = [known for known in known_keys() if known.rpartition(".")[0] == section]
        assert problem.endswith(f"known here: {', '.join(siblings)}")


def test_all_problems_are_said_at_once_each_with_its_key():
    found = problems(
        {
            "model.dtype": "float16",
            "data.partition.scheme": "dirichlet",
            "federation.delay": -1,
            "train.num_local_steps": 0,
            "train.lerning_rate": 1,
            "wire.error_feedback": True,
            "seed": "many",
        }
    )
    keys = [problem.partition(":")[0] for problem in found]
    assert sorted(keys) == sorted(
        [
            "model.dtype",
            "data.partition",
            "federation.delay",
            "train.num_local_steps",
            "train.lerning_rate",
            "wire",
            "seed",
        ]
    )


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
    assert key == "blocks.layers_per_block" and "each site would choose for itself" in problem


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train.num_local_steps": 0}, "train.num_local_steps: must be at least 1, not 0"),
        (
            {"train.num_local_steps": "auto", "train.min_local_steps": 9, "train.max_local_steps": 8},
            "train: min_local_steps 9 is above max_local_steps 8",
        ),
        (
            {"report_to": ["tensorboard", "tensorboard"]},
            "report_to: tensorboard, tensorboard: name each tracker once",
        ),
        ({"report_to": "abacus"}, "report_to.0: "),
        ({"blocks.layers_per_block": 0}, "blocks.layers_per_block: must be at least 1, not 0"),
        ({"blocks.layers_per_block": True}, "blocks.layers_per_block"),
        ({"train.num_local_steps": 2.5}, "train.num_local_steps"),
        ({"federation.delay": -1}, "federation.delay: Input should be greater than or equal to 0 (given: -1)"),
        ({"federation.participation": 0}, "federation.participation"),
        ({"federation.participation": 1.5}, "federation.participation"),
        ({"federation.num_clients": 0}, "federation.num_clients"),
        ({"train.learning_rate": "fast"}, "train.learning_rate"),
        ({"train.learning_rate": float("nan")}, "train.learning_rate"),
        ({"train.learning_rate": float("inf")}, "train.learning_rate"),
        ({"train.warmup_ratio": 1}, "train.warmup_ratio"),
        ({"link.upload_mbps": 0}, "link.upload_mbps"),
        ({"model.dtype": "float16"}, "model.dtype: Input should be 'float32' or 'bfloat16' (given: 'float16')"),
        ({"data.train": []}, "data.train"),
        ({"data.train": [""]}, "data.train: holds an empty name"),
        ({"train.learning_rate": True}, "train.learning_rate: must not be true"),
        ({"federation.server_optimizer.name": False}, "federation.server_optimizer.name: must not be false"),
        ({"data.max_length": 4}, "data.max_length"),
        ({"data.partition.scheme": "by_field"}, "data.partition: scheme by_field needs `field`"),
        ({"checkpoint.keep": 0}, "checkpoint.keep"),
        ({"seed": -1}, "seed"),
        ({"federation": 3}, "federation"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_named_with_its_key(values: dict[str, Any], said: str):
    (problem,) = problems(values)
    assert problem.startswith(said)


# -- method and delay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "method", "delay"),
    [
        ({}, "parablock", 1),
        ({"delay": 0}, "fl_bcd", 0),
        ({"delay": 3}, "parablock", 3),
        ({"method": "fl_bcd"}, "fl_bcd", 0),
        ({"method": "fedavg"}, "fedavg", 0),
        ({"method": "fl_bcd", "delay": 0}, "fl_bcd", 0),
        ({"method": "parablock", "delay": 2}, "parablock", 2),
    ],
)
def test_the_method_is_a_name_for_the_delay(given: dict[str, Any], method: str, delay: int):
    federation = parsed(**{f"federation__{key}": value for key, value in given.items()}).federation
    assert (federation.method, federation.delay) == (method, delay)


@pytest.mark.parametrize(
    "method", ["fl_bcd", "fedavg", "fedprox", "fedit", "ffa_lora", "flora", "fedcybgd", "local", "central"]
)
def test_a_method_without_delay_refuses_one(method: str):
    (problem,) = problems({"federation.method": method, "federation.delay": 1})
    assert problem.startswith(f"federation: method {method} has delay 0, not 1")


def test_a_method_without_blocks_refuses_what_is_said_of_them():
    fedavg = {"federation.method": "fedavg", "federation.delay": 0}
    found = problems({**fedavg, "blocks.layers_per_block": 2, "blocks.schedule": "cyclic"})
    assert {problem.split(":")[0] for problem in found} == {"blocks.layers_per_block", "blocks.schedule"}
    assert all("no effect with method fedavg" in problem and "leave it out" in problem for problem in found)
    kept = parsed(federation__method="fedavg", blocks__layers_path="model.layers")  # it says where the layers are
    assert kept.blocks.layers_path == "model.layers"
    assert parsed(federation__method="fl_bcd", blocks__layers_per_block=2).blocks.layers_per_block == 2


def test_the_method_of_a_written_configuration_can_be_changed_by_its_delay_alone(tmp_path: Path):
    path = write(tmp_path / "config.yaml", parsed().to_yaml())  # says method: parablock
    assert load_config(path, ["federation.delay=0"]).federation.method == "fl_bcd"


# -- nothing is ignored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", NOT_BUILT_YET)
def test_what_is_not_built_is_refused_and_says_so(key: str):
    (problem,) = problems(NOT_BUILT_YET[key])
    assert problem.startswith(f"{key}: {NOT_BUILT_YET[key][key]} {NOT_BUILT}")
    without = {other: value for other, value in NOT_BUILT_YET[key].items() if other != key}
    parse_config(nested({**REQUIRED, **without}))


def test_all_that_stacked_adapters_leave_no_room_for_is_said_at_once():
    asked = {
        "federation.aggregation": "median",
        "federation.server_optimizer.name": "momentum",
        "privacy.clip_norm": 1.0,
        "wire.chunk_bytes": 65536,
        "train.optimizer_state": "keep",
    }
    found = problems({"federation.method": "flora", "federation.delay": 0, **asked})
    keys = ["federation.aggregation", "federation.server_optimizer", *list(asked)[2:]]
    assert [problem.partition(":")[0] for problem in found] == keys
    assert all("flora" in problem for problem in found)
    parse_config(nested({**REQUIRED, "federation.method": "fedit", "federation.delay": 0, **asked}))


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
            "federation.num_clients": 2,
            "federation.participation": 0.9,
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


# -- faults ---------------------------------------------------------------------------------------------------

WRONG_FAULTS = {
    "no client": (
        {"client": 8, "round": 0, "at": "train", "kind": "drop"},
        "faults.0.client: there is no client 8 of 8",
    ),
    "no round": (
        {"client": 0, "round": 64, "at": "train", "kind": "drop"},
        "faults.0.round: there is no round 64 of 64",
    ),
    "a kind elsewhere": ({"client": 0, "round": 0, "at": "commit", "kind": "nan"}, "there is no nan at commit"),
    "no value": (
        {"client": 0, "round": 0, "at": "train", "kind": "delay"},
        "delay at train needs a value: seconds",
    ),
    "a value too many": (
        {"client": 0, "round": 0, "at": "train", "kind": "nan", "value": 2},
        "has no effect with nan",
    ),
    "no such key": (
        {"client": 0, "round": 0, "at": "train", "kind": "drop", "vlaue": 2},
        "faults.0.vlaue: unknown key; known here: client, round, at, kind, value",
    ),
    "before it began": (
        {"client": 0, "round": 0, "at": "train", "kind": "kill", "value": -1},
        "at least 0, not -1",
    ),
}


@pytest.mark.parametrize("case", WRONG_FAULTS)
def test_a_fault_that_cannot_happen_is_refused(case: str):
    fault, words = WRONG_FAULTS[case]
    (problem,) = problems({"faults": [fault]})
    assert words in problem


def test_a_commit_cannot_need_more_updates_than_are_asked_for():
    (problem,) = problems({"federation.min_updates": 3, "federation.participation": 0.25})
    assert problem == "federation.min_updates: 3 of 2 updates: so many are asked for in a round"
    assert parsed(federation__min_updates=8).federation.min_updates == 8
