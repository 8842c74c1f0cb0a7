"""Reading a configuration: files, `--set`, and all problems at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from parablock.errors import ConfigError
from parablock.settings import NOT_BUILT, RunConfig, TrainSection

__all__ = ["NOT_BUILT", "RunConfig", "TrainSection", "known_keys", "load_config", "parse_config"]


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file, apply `--set key=value` overrides, and validate the whole.

    Args:
        path: A YAML file.
        overrides: `dotted.key=value`; the value is read as YAML.

    Raises:
        ConfigError: With every problem: a missing or broken file, unknown keys, wrong values.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"there is no file {path}; give the path of a YAML file"], source=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"it cannot be read: {error}"], source=str(path)) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"it is not YAML: {' '.join(str(error).split())}"], source=str(path)) from None
    if not isinstance(tree, dict):
        raise ConfigError(["it must hold sections such as `model:` and `data:`"], source=str(path))
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: Mapping[str, Any], *, source: str = "the configuration") -> RunConfig:
    """Validate a tree of plain values.

    Raises:
        ConfigError: With every problem, each with its key path; unknown keys name the nearest known one.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([_problem(item) for item in error.errors()], source=source) from None


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterable[str]:
    """Yield the dotted path of every key, depth first."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError([f"{override!r} is not key=value, such as train.num_local_steps=4"], source="--set")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            [f"{key}: {text!r} is not YAML: {' '.join(str(error).split())}"], source="--set"
        ) from None
    *sections, name = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError([f"{key}: {section} is a value, not a section"], source="--set")
    tree[name] = value


def _problem(item: Any) -> str:
    path = [str(part) for part in item["loc"] if part not in ("int", *_literal_tags(item["loc"]))]
    key = ".".join(path) or "the whole"
    if item["type"] == "extra_forbidden":
        candidates = list(known_keys())
        near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.6) or [
            known for known in candidates if known.rsplit(".", 1)[-1] == path[-1]
        ]
        hint = f"; did you mean `{near[0]}`?" if near else f"; known here: {_siblings(path)}"
        return f"{key}: unknown key{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{key}: required and not given"
    if isinstance(item["input"], str | int | float | bool) and repr(item["input"]) not in message:
        message += f" (given: {item['input']!r})"
    return f"{key}: {message}"


def _literal_tags(location: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part) for part in location if str(part).startswith("literal["))


def _siblings(path: list[str]) -> str:
    prefix = ".".join(path[:-1])
    depth = len(path)
    return ", ".join(key for key in known_keys() if key.count(".") == depth - 1 and key.startswith(prefix))
