"""Load a configuration: YAML files, `--set`, and all problems at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from parablock.config.keys import RunConfig
from parablock.config.methods import METHODS, OWNERS, may_fit_blocks, without_effect
from parablock.config.section import FaultSection
from parablock.errors import ConfigError, did_you_mean, no_file

S = TypeVar("S", bound=BaseModel)

COMMAND_LINE = "the command line"
TOGETHER = "the settings together"
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""The errors of PyYAML: its own, and those of Python for a date in the 13th month or endless nesting."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file, apply overrides `dotted.key=value` with YAML values, and validate the whole.

    Raises:
        ConfigError: With every problem: a missing or broken file, unknown keys, wrong values.
    """
    path = Path(path)
    return _parse(overridden(read_tree(path), overrides), path, overrides)


def load_server_config(path: Path, overrides: Sequence[str] = (), *, engine: str = "remote") -> RunConfig:
    """Read the configuration of a run at real sites, in which `data.train` may be left out: they have the rows.

    Raises:
        ConfigError: With every problem.
    """
    tree = overridden(read_tree(path), [*overrides, *at_sites(engine)])
    if isinstance(tree.get("data"), dict):
        tree["data"].setdefault("train", [])
    return _parse(tree, path, overrides)


def lacks_rows(path: Path, overrides: Sequence[str] = ()) -> bool:
    """Tell whether a configuration names no rows to train on, as that of a server whose sites have them."""
    data = overridden(read_tree(path), overrides).get("data")
    return isinstance(data, dict) and "train" not in data


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Put overrides `dotted.key=value` into a tree of plain values, and return it, or raise a ConfigError."""
    problems = [problem for override in overrides if (problem := _apply(tree, override))]
    if problems:
        raise ConfigError(problems, source="--set")
    return tree


def _parse(tree: Mapping[str, Any], path: Path, overrides: Sequence[str]) -> RunConfig:
    """Validate a tree of a file and overrides; of each problem the error says which of both it comes from."""
    try:
        return parse_config(tree, source=str(path))
    except ConfigError as error:
        given = [override.partition("=")[0].strip() for override in overrides]
        begins = tuple(f"{key}{end}" for key in given for end in ":.,")
        if all(problem.startswith(begins) for problem in error.problems):
            raise ConfigError(error.problems, source=COMMAND_LINE) from None
        told = [f"{one} (on {COMMAND_LINE})" if one.startswith(begins) else one for one in error.problems]
        beside = f" (with {', '.join(given)} of {COMMAND_LINE})" if given else ""
        told = [f"{one}{beside}" if one.startswith(f"{TOGETHER}:") else one for one in told]
        raise ConfigError(told, source=str(path)) from None


def parse_config(tree: Mapping[str, Any], *, source: str = "the configuration") -> RunConfig:
    """Validate a tree of plain values; a ConfigError lists every problem with its key path."""
    return validate(RunConfig, tree, source=source)


def validate(section: type[S], tree: Mapping[str, Any], *, source: str) -> S:
    """Validate a tree of plain values as any section; see `parse_config`."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        problems: dict[str, str] = {}  # a key that may be of several types fails once for each of them
        for item in error.errors():
            key, problem = _problem(item, section)
            problems.setdefault(key, f"{key}: {problem}")
        raise ConfigError(list(problems.values()), source=source) from None


def tree_of_method(config: RunConfig, name: str, delay: int, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Write a configuration for another method as a tree of plain values, without what has no effect with it.

    `settings` such as `train.learning_rate=0.003` are put over what the configuration says.
    """
    method, tree = METHODS[name], config.model_dump(mode="json")
    tree["federation"] |= {"method": name, "delay": delay}
    idle = [key for key in OWNERS if key not in method.own_keys]
    for key in (*idle, *without_effect(name, delay)):
        *sections, last = key.split(".")
        del reduce(getitem, sections, tree)[last]
    if "blocks" not in tree:  # every method needs the layers
        tree["blocks"] = {"layers_path": config.blocks.layers_path}
    fits = method.trains == "blocks" and config.federation.traits.trains != "blocks"
    if fits:
        del tree["blocks"]["layers_per_block"]  # nobody has said how many
    if "learning_rate" not in config.train.model_fields_set:  # each method has its own
        del tree["train"]["learning_rate"]
    tree = overridden(tree, settings)
    parts = [tree.get(section) for section in ("blocks", "engine", "train")]
    if fits and all(isinstance(part, Mapping) for part in parts) and may_fit_blocks(tree):
        tree["blocks"].setdefault("layers_per_block", "auto")  # every block is to be visited
    return tree


def read_tree(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections; raise a ConfigError if that fails."""
    try:
        if kind := no_file(path):
            raise ConfigError([f"it is {kind}; write the settings to a file, and give its path"], source=str(path))
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        text = f"there is no file {path}; give the path of a YAML file. {did_you_mean(path)}".removesuffix(". ")
        raise ConfigError([text], source=str(path)) from None
    except IsADirectoryError:
        inside = f", such as {path / 'config.yaml'}" if (path / "config.yaml").is_file() else ""
        raise ConfigError([f"it is a folder; give the path of a YAML file{inside}"], source=str(path)) from None
    except UnicodeDecodeError:
        text = "it is not in UTF-8; convert it first, such as with: iconv -f utf-16 -t utf-8 (or -f latin1)"
        raise ConfigError([text], source=str(path)) from None
    except OSError as error:
        raise ConfigError([f"it cannot be read: {error.strerror or error}"], source=str(path)) from None
    except NOT_YAML as error:
        raise ConfigError([f"it is not YAML: {_yaml_problem(error)}"], source=str(path)) from None
    if not isinstance(tree, dict):
        raise ConfigError(["it must hold sections such as `model:` and `data:`"], source=str(path))
    return {key: value for key, value in tree.items() if value is not None}  # a heading with nothing below it


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterable[str]:
    """Yield the dotted path of every key, depth first."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def read_yaml(text: str) -> Any:
    """Read YAML as configurations are read: numbers are decimal, and only true and false are truth values.

    PyYAML reads YAML 1.1, in which `1:30` is 90, `010` is 8, and `no` and `off` are false. Here `1:30`, `0x10` and
    `no` are text, and `010` is refused. All else is read as PyYAML reads it, so that what it writes comes back.

    Raises:
        Exception: One of `NOT_YAML`.
    """
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """YAML with plain numbers, which refuses a repeated key, whose first value would be ignored."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML's classes have it
        first: [(tag, pattern) for tag, pattern in each if tag.rpartition(":")[2] not in ("bool", "int", "float")]
        for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)

    def refuse_octal(self, node: yaml.ScalarNode) -> Any:
        raise yaml.constructor.ConstructorError(
            problem=f"{node.value} begins with 0, by which some programs read an octal number: write it without "
            "that 0, or in quotes where it is a name",
            problem_mark=node.start_mark,
        )


_YAML = "tag:yaml.org,2002:"
for _tag, _pattern, _first in (
    (f"{_YAML}bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (f"{_YAML}int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (f"{_YAML}float", r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?", "-+0123456789"),
    (f"{_YAML}float", r"\.[0-9][0-9_]*([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("!octal", r"[-+]?0[0-7_]+", "-+0"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"({_pattern})$"), list(_first))
_Loader.add_constructor("!octal", _Loader.refuse_octal)


def _apply(tree: dict[str, Any], override: str) -> str:
    """Put one override into the tree; return the problem, empty without one."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return f"{override!r} is not key=value, such as train.num_local_steps=4"
    try:
        value = read_yaml(text)
    except NOT_YAML as error:
        return f"{key}: {text!r:.200} is not YAML: {_yaml_problem(error)}"
    *sections, name = key.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            return f"{key}: {section} is a value, not a section"
        tree = below
    tree[name] = value
    return ""


def _yaml_problem(error: BaseException) -> str:
    """Return a YAML error in one line, with its place."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())[:500]
    mark = error.problem_mark
    while_doing = f"{error.context}, " if error.context else ""
    return f"{while_doing}{error.problem}, in line {mark.line + 1}, column {mark.column + 1}"


def _problem(item: Any, root: type[BaseModel]) -> tuple[str, str]:
    """Return the key path of a problem, and its text."""
    path = [str(part) for part in item["loc"] if part != "int" and not str(part).startswith("literal[")]
    if path and path[-1].isdecimal():  # an item of a list
        path[-2:] = [f"{path[-2]}, entry {int(path[-1]) + 1}"] if len(path) > 1 else path
    key = ".".join(path) or TOGETHER
    if item["type"] == "extra_forbidden":
        return key, f"unknown key{_hint(key, root)}"
    message = in_words(item)
    if item["type"] == "missing":
        return key, "required and not given"
    if isinstance(item["input"], str | int | float | bool) and repr(item["input"]) not in message:
        message += f" (given: {item['input']!r})"
    return key, message


_IN_WORDS = {
    "model_type": "it must be a section of settings, such as {key: value}",
    "model_attributes_type": "it must be a section of settings, such as {key: value}",
    "dict_type": "it must be a section of settings, such as {key: value}",
    "tuple_type": "it must be a list, such as [one, two]",
    "list_type": "it must be a list, such as [one, two]",
    "int_type": "it must be a whole number",
    "int_parsing": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "float_parsing": "it must be a number",
    "bool_type": "it must be true or false",
    "bool_parsing": "it must be true or false",
    "string_type": "it must be text",
}
"""Types of pydantic's errors, which speak of Python's types, in words of YAML."""


def in_words(item: Any) -> str:
    """Say what is wrong with a value, of one of the errors of pydantic's `ValidationError`."""
    given: str = item["msg"].removeprefix("Value error, ")
    return _IN_WORDS.get(item["type"]) or re.sub("^Input should", "it must", given)


def _hint(key: str, root: type[BaseModel]) -> str:
    """Return the known key next to an unknown one, or all keys of its section."""
    section, _, name = key.rpartition(".")
    if section.startswith("faults."):
        return f"; known here: {', '.join(FaultSection.model_fields)}"
    leaf = {known: known.rpartition(".")[2] for known in known_keys(root)}
    siblings = {leaf[known]: known for known in leaf if known.rpartition(".")[0] == section}
    siblings = siblings or {known: known for known in leaf if "." not in known}
    near = [
        *(siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)),
        *(known for known in siblings.values() if len(name) > 2 and name in leaf[known]),
        *(known for known in leaf if leaf[known] == name),
    ]
    return f"; did you mean `{near[0]}`?" if near else f"; known here: {', '.join(siblings.values())}"


def at_sites(engine: str) -> list[str]:
    """Return the overrides that run a configuration at real sites, in real time, whatever it was made for."""
    return [f"engine.name={engine}", "engine.clock=real", "engine.step_time_s=null"]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a configuration by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return leaves
