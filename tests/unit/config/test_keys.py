"""The keys of a configuration: their names and defaults are frozen, because users rely on them."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from dotted import REQUIRED, flat, parsed, problems
from parablock.config.keys import RunConfig
from parablock.config.load import known_keys, parse_config, tree_of_method
from parablock.config.methods import METHODS
from parablock.config.section import Section
from parablock.errors import ConfigError

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
    "data.date": None,
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
    "federation.excluded_clients": [],
    "federation.stall_timeout_s": 600.0,
    "train.num_local_steps": 8,
    "train.min_local_steps": 1,
    "train.max_local_steps": 64,
    "train.per_device_train_batch_size": 8,
    "train.gradient_accumulation_steps": 1,
    "train.optimizer": "adamw",
    "train.learning_rate": 5e-4,
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
    "wire.density": 0.02,
    "wire.rounding": "stochastic",
    "wire.error_feedback": False,
    "wire.residual_decay": 1.0,
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
    "evaluation.num_answers": 3,
    "checkpoint.every_rounds": 8,
    "checkpoint.keep": 2,
    "federation.trim_fraction": 0.2,
    "federation.assumed_attackers": 1,
    "federation.max_client_examples": None,
    "privacy.clip_norm": None,
    "privacy.noise_multiplier": 0.0,
    "privacy.mode": "central",
    "privacy.delta": 1e-5,
    "privacy.secure_aggregation": "none",
    "faults": [],
    "report_to": [],
    "seed": 0,
}


def test_the_keys_and_their_defaults_are_those_that_users_rely_upon():
    assert flat(parsed()) == DEFAULTS


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_a_learning_rate_of_its_own_and_a_given_one_wins(method: str):
    rate = {"blocks": 5e-4, "adapters": 1e-3, "everything": 5e-5}[METHODS[method].trains]
    assert parsed(federation__method=method, federation__delay=METHODS[method].delay).train.learning_rate == rate
    steps = parsed(federation__method=method, federation__delay=METHODS[method].delay, train__num_local_steps=3)
    assert (steps.train.learning_rate, steps.train.num_local_steps) == (rate, 3)
    assert parse_config(steps.model_dump()) == steps
    for given in (1e-4, rate):
        config = parsed(federation__method=method, train__learning_rate=given, federation__delay=0)
        assert config.train.learning_rate == given


def test_a_configuration_for_another_method_has_its_rate_or_the_given_one():
    def rate(config: RunConfig, method: str) -> float:
        return parse_config(tree_of_method(config, method, 0)).train.learning_rate

    assert (rate(parsed(), "fedavg"), rate(parsed(), "fedit")) == (5e-5, 1e-3)
    muon = parsed(train__optimizer="muon")
    assert [rate(muon, method) for method in ("parablock", "fedavg", "fedit")] == [5e-3, 5e-4, 3e-3]
    assert rate(parsed(train__optimizer="muon", train__learning_rate=0.01), "fedit") == 0.01
    given = parsed(train__learning_rate=5e-4)  # as the method would have it, and given all the same
    assert (rate(given, "fedavg"), rate(given, "fedit")) == (5e-4, 5e-4)
    assert rate(parsed(federation__method="fedavg"), "fl_bcd") == 5e-4


def test_what_is_wrong_beside_a_missing_rate_is_told_at_its_place():
    values = {"federation.method": "fedsum", "train.num_local_steps": 0, "seed": -1}
    assert {problem.split(":")[0] for problem in problems(values)} == {
        "federation.method",
        "train.num_local_steps",
        "seed",
    }


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
