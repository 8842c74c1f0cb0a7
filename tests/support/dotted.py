"""Configurations written as keys with dots."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import pytest

from parablock.config.keys import RunConfig
from parablock.config.load import known_keys, parse_config
from parablock.errors import ConfigError

REQUIRED = {"model.name_or_path": "org/model", "data.train": ["train.jsonl"]}


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
