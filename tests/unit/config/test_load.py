"""Configurations from YAML and `--set`: what is read, written back, and refused with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dotted import REQUIRED, flat, nested, parsed, problems
from parablock.config.keys import RunConfig
from parablock.config.load import known_keys, load_config, parse_config
from parablock.errors import ConfigError

# For every built key a value that is not its default, with what else it needs.
TOGETHER: dict[str, Any] = yaml.safe_load(
    """{
    seed: 3, report_to: [tensorboard], model.dtype: bfloat16, model.device: cpu, model.init: random,
    data.test: [test.jsonl], data.format: gsm8k, data.max_length: 64,
    data.partition.scheme: dirichlet, data.partition.field: label, data.partition.alpha: 0.1,
    blocks.layers_per_block: 2, blocks.split: attention_mlp, blocks.schedule: importance,
    blocks.include_embeddings: true, blocks.include_head: true, blocks.allow_unvisited: true,
    blocks.layers_path: model.layers, federation.num_clients: 5, federation.num_rounds: 9, federation.delay: 2,
    federation.participation: 0.8, federation.in_flight: own, federation.stall_timeout_s: 5.0,
    federation.excluded_clients: [1],
    federation.min_updates: 2, federation.deadline_factor: 3.0, federation.server_optimizer.name: momentum,
    federation.server_optimizer.momentum: 0.5, federation.server_optimizer.learning_rate: 0.1,
    train.num_local_steps: 4, train.per_device_train_batch_size: 2, train.gradient_accumulation_steps: 4,
    train.learning_rate: 0.01, train.weight_decay: 0.1, train.max_grad_norm: 0.0, train.adam_beta1: 0.8,
    train.adam_beta2: 0.99, train.adam_epsilon: 1.0e-6, train.optimizer_state: keep,
    train.lr_scheduler_type: cosine, train.warmup_ratio: 0.1, train.gradient_checkpointing: true,
    train.completion_only_loss: false, wire.format: int8, wire.rounding: nearest, wire.error_feedback: true,
    wire.chunk_bytes: 65536, link.upload_mbps: 10.0, link.download_mbps: 10.0, link.latency_s: 0.1,
    engine.num_threads: 2, engine.clock: virtual, engine.step_time_s: 0.1, evaluation.every_rounds: 0,
    evaluation.max_examples: 10, evaluation.per_device_eval_batch_size: 4,
    evaluation.num_answers: 1, checkpoint.every_rounds: 0,
    checkpoint.keep: 1, faults: [{client: 2, round: 7, at: upload, kind: drop, value: 360.0}]
    }"""
)
SUM = {"privacy.clip_norm": 2.0, "wire.streaming": False}
OTHER_VALUES: list[dict[str, Any]] = [
    TOGETHER,
    {"data.test_fraction": 0.2},
    {"data.partition.scheme": "by_field", "data.partition.field": "label"},
    {"data.partition.field": "label"},  # the histogram counts by it
    {"blocks.layers_per_block": "auto", "link.upload_mbps": 10},
    {"federation.method": "fedavg", "federation.delay": 0},
    {"federation.server_optimizer.name": "adam"},
    {"federation.aggregation": "median"},
    {"federation.max_client_examples": 100},
    {"federation.aggregation": "trimmed_mean", "federation.trim_fraction": 0.3},
    {"federation.aggregation": "krum", "federation.assumed_attackers": 2},
    {**SUM, "privacy.secure_aggregation": "plain"},
    {**SUM, "privacy.secure_aggregation": "masked", "engine.name": "flower"},
    {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 0.5, "privacy.delta": 1e-6, "privacy.mode": "local"},
    {"train.num_local_steps": "auto", "train.min_local_steps": 2, "train.max_local_steps": 32},
    {"wire.format": "bfloat16"},
    {"wire.format": "int4"},
    {"wire.format": "int2"},
    {"federation.method": "fedprox", "federation.delay": 0, "federation.proximal_mu": 0.5},
    {"federation.method": "fedit", "federation.delay": 0, "lora.rank": 4, "lora.alpha": 8.0},
    {"federation.method": "ffa_lora", "federation.delay": 0, "lora.target_modules": ["q_proj"]},
    {"federation.method": "flora", "federation.delay": 0},
    {"federation.method": "rolora", "federation.delay": 2, "federation.in_flight": "mean"},
    {"federation.method": "fedavg", "federation.delay": 1, "federation.in_flight": "share"},
    {
        "federation.method": "fedit",
        "federation.delay": 1,
        "train.optimizer": "muon",
        "train.optimizer_state": "auto",
    },
    {"federation.method": "fedavg", "wire.format": "sparse2", "wire.density": 0.01, "wire.residual_decay": 0.95},
    {"engine.name": "flower"},
    {"data.date": "2024-02-29"},
]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MINIMAL = "model: {name_or_path: org/model}\ndata: {train: train.jsonl}\n"


@pytest.mark.parametrize("values", OTHER_VALUES, ids=lambda values: ",".join(values)[:60])
def test_what_is_written_is_what_is_read(values: dict[str, Any], tmp_path: Path):
    config = parse_config(nested({**REQUIRED, **values}))
    again = load_config(write(tmp_path / "config.yaml", config.to_yaml()))
    assert again == config != parsed()
    assert {key: flat(again)[key] for key in values} == values


def test_every_built_key_has_another_value_that_is_accepted():
    accepted = {key for values in OTHER_VALUES for key in values}
    untouched = set(flat(parsed())) - set(REQUIRED) - accepted
    assert not untouched


def test_one_file_may_stand_without_a_list():
    config = parsed(data__train="a.jsonl", data__test="b.jsonl")
    assert config.data.train == ("a.jsonl",)
    assert config.data.test == ("b.jsonl",)


def test_columns_are_of_known_fields_and_days_are_days(tmp_path: Path):
    text = "model: {name_or_path: m}\ndata: {train: a.jsonl, columns: {prompt: frage}, date: 2024-02-29}\n"
    config = load_config(write(tmp_path / "config.yaml", text))
    assert (config.data.columns, config.data.date) == ({"prompt": "frage"}, "2024-02-29")
    assert load_config(write(tmp_path / "again.yaml", config.to_yaml())) == config
    with pytest.raises(
        ConfigError, match=r"no format has a field 'promt' \(did you mean prompt\?\); known are messages, "
    ):
        parsed(data__columns={"promt": "frage"})
    with pytest.raises(ConfigError, match="prompt and completion are both column 'frage'"):
        parsed(data__columns={"prompt": "frage", "completion": "frage"})
    with pytest.raises(ConfigError, match="must be a day such as 2025-01-31, not"):
        parsed(data__date="29.2.2024")


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
    assert flat(config)[key] == value != flat(parsed())[key]


def test_set_goes_over_the_file_clears_and_fills_it_and_the_last_one_wins(tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL + "seed: 1\nlink: {upload_mbps: 5}\ntrain:\n")
    assert (load_config(path).seed, load_config(path).link.upload_mbps) == (1, 5)
    config = load_config(path, ["seed=2", "seed=3", "link.upload_mbps=null", "train.num_local_steps=4"])
    assert (config.seed, config.link.upload_mbps, config.train.num_local_steps) == (3, None, 4)


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
    ("written", "value"),
    [
        ("8", 8),
        ("+8", 8),
        ("1_000", 1000),
        ("010", None),
        ("0x10", None),
        ("0b11", None),
        ("1:30", None),
        ("yes", None),
    ],
)
def test_a_number_is_decimal_or_refused_with_its_value(written: str, value: int | None, tmp_path: Path):
    path = write(tmp_path / "run.yaml", f"{MINIMAL}federation:\n  num_rounds: {written}\n")
    for file, overrides in (
        (path, []),
        (write(tmp_path / "a.yaml", MINIMAL), [f"federation.num_rounds={written}"]),
    ):
        if value is not None:
            assert load_config(file, overrides).federation.num_rounds == value
            continue
        with pytest.raises(ConfigError) as caught:
            load_config(file, overrides)
        assert written in str(caught.value)
        assert "num_rounds" in str(caught.value) or "line 4, column 15" in str(caught.value)


def test_what_is_no_decimal_number_and_not_true_or_false_is_text(tmp_path: Path):
    names = ["no", "on", "0x10", "1:30", "08", "1e5", "null and void"]
    path = write(tmp_path / "run.yaml", f"model: {{name_or_path: no}}\ndata: {{train: [{', '.join(names)}]}}\n")
    config = load_config(path)
    assert (config.model.name_or_path, list(config.data.train)) == ("no", names)
    again = write(tmp_path / "again.yaml", config.to_yaml())
    assert load_config(again) == config
    assert yaml.safe_load(again.read_text())["data"]["train"] == names  # another program reads the same
    rates = {"1e-4": 1e-4, "1.5e-4": 1.5e-4, "1.0e-05": 1e-5, ".5": 0.5}
    for text, rate in rates.items():
        assert load_config(path, [f"train.learning_rate={text}"]).train.learning_rate == rate
    assert not load_config(path, ["train.completion_only_loss=no"]).train.completion_only_loss
    assert load_config(path, ["engine.num_threads=~"]).engine.num_threads is None


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


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train.num_local_steps": 0}, "train.num_local_steps: must be at least 1, not 0"),
        ({"train.num_local_steps": "auto", "train.min_local_steps": 9, "train.max_local_steps": 8}, "train: min_"),
        ({"report_to": ["tensorboard", "tensorboard"]}, "report_to: tensorboard, tensorboard: name each"),
        ({"report_to": "abacus"}, "report_to, entry 1: "),
        ({"blocks.layers_per_block": 0}, "blocks.layers_per_block: must be at least 1, not 0"),
        ({"blocks.layers_per_block": True}, "blocks.layers_per_block"),
        ({"train.num_local_steps": 2.5}, "train.num_local_steps"),
        ({"federation": 3}, "federation: it must be a section of settings, such as {key: value} (given: 3)"),
        ({"data.train": {}}, "data.train: it must be a list, such as [one, two]"),
        ({"report_to": [1]}, "report_to, entry 1: it must be 'tensorboard' or 'wandb' (given: 1)"),
        ({"federation.num_rounds": 1.5}, "federation.num_rounds: it must be a whole number (given: 1.5)"),
        ({"federation.delay": -1}, "federation.delay: it must be greater than or equal to 0 (given: -1)"),
        ({"federation.participation": 1.5}, "federation.participation"),
        ({"federation.num_clients": 0}, "federation.num_clients"),
        ({"train.learning_rate": "fast"}, "train.learning_rate"),
        ({"train.learning_rate": float("nan")}, "train.learning_rate"),
        ({"train.warmup_ratio": 1}, "train.warmup_ratio"),
        ({"link.upload_mbps": 0}, "link.upload_mbps"),
        ({"model.dtype": "float16"}, "model.dtype: it must be 'float32' or 'bfloat16' (given: 'float16')"),
        ({"data.train": []}, "data.train"),
        ({"data.train": [""]}, "data.train: holds an empty name"),
        ({"train.learning_rate": True}, "train.learning_rate: must not be true"),
        ({"federation.server_optimizer.name": False}, "federation.server_optimizer.name: must not be false"),
        ({"data.max_length": 4}, "data.max_length"),
        ({"data.partition.scheme": "by_field"}, "data.partition: scheme by_field needs `field`"),
        ({"train": 4}, "train: "),
        ({"checkpoint.keep": 0}, "checkpoint.keep"),
        ({"seed": -1}, "seed"),
        ({"federation": 3}, "federation"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_named_with_its_key(values: dict[str, Any], said: str):
    (problem,) = problems(values)
    assert problem.startswith(said)


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


def test_the_method_of_a_written_configuration_can_be_changed_by_its_delay_alone(tmp_path: Path):
    path = write(tmp_path / "config.yaml", parsed().to_yaml())  # says method: parablock
    assert load_config(path, ["federation.delay=0"]).federation.method == "fl_bcd"


def test_a_problem_of_the_settings_together_names_what_the_command_line_gave(tmp_path: Path):
    file = tmp_path / "run.yaml"
    settings = {**REQUIRED, "federation.num_clients": 2, "data.partition.scheme": "by_file"}
    file.write_text(yaml.safe_dump(nested(settings)))
    with pytest.raises(ConfigError) as refused:
        load_config(file, ["data.train=[one.jsonl]", "seed=1"])
    (problem,) = refused.value.problems
    assert problem.startswith("the settings together: ")
    assert problem.endswith("(with data.train, seed of the command line)")
