"""Write docs/configuration.md from the keys, and the table of docs/baselines.md from the methods.

    .venv/bin/python docs/generate_configuration.py

What is built is not written down anywhere: every value is tried, and one that is refused as not built says so.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.config.methods import METHODS, Method
from parablock.config.section import NOT_BUILT
from parablock.errors import ConfigError

PAGE = Path(__file__).parent / "configuration.md"
BASELINES = PAGE.with_name("baselines.md")
MARKS = "<!-- docs/generate_configuration.py writes from here -->\n", "<!-- to here -->\n"

HEAD = """\
# Configuration

<!-- Written by docs/generate_configuration.py. Change src/parablock/config/keys.py, not this page. -->

A configuration is a YAML file. Only `model.name_or_path` and `data.train` have no default. An unknown key or a
wrong value is refused, all problems at once, before anything is read or written. `--set key=value` changes a key
for one run (`--set train.learning_rate=3e-4`); the value is read as YAML. `config.yaml` in the run directory holds
every key with the value that the run had.

**Built** says what works in this version. The rest is refused with an error that says so, and never ignored.
"""

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text"}
FAULT = {"client": 0, "round": 0, "at": "upload", "kind": "drop"}


def page() -> str:
    """Write the whole page."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            parts.append(f"## `{name}`\n\n{(section.__doc__ or '').strip()}\n\n{table(section, f'{name}.')}")
    parts.append(f"## Without a section\n\n{table(RunConfig, '', nested=False)}")
    return "\n".join(parts)


def baselines(text: str) -> str:
    """Return the page of the baselines with the table of methods as their rows have it."""
    before, _, rest = text.partition(MARKS[0])
    lines = [
        "| method | published as | trained in a round | delay | learning rate | own keys | what sets it apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        source = f"{method.title}: {method.source}" if method.source else "a bound, not a method"
        keys = ", ".join(f"`{key}`" for key in method.own_keys)
        delay = "0" if not method.may_lag else "at least 1" if method.without_delay else "any"
        rate = f"{method.learning_rate('adamw'):g}"
        cells = [f"`{name}`", source, trained(method), delay, rate, keys, method.summary]
        lines.append(f"| {' | '.join(cells)} |")
    return before + MARKS[0] + "\n".join(lines) + "\n" + MARKS[1] + rest.partition(MARKS[1])[2]


def trained(method: Method) -> str:
    """Say what a round trains, and whether it is sent."""
    adapters = " or ".join(" and ".join(group) for group in method.matrices)
    words = {"blocks": "one block", "everything": "all parameters", "adapters": f"LoRA {adapters}"}
    return words[method.trains] + ("" if method.sends else "; nothing is sent")


def table(section: type[BaseModel], prefix: str, *, nested: bool = True) -> str:
    """Write the keys of a section, and of the sections in it when `nested`."""
    lines = ["| key | type | default | built | meaning |", "|---|---|---|---|---|"]
    for key, field in keys(section, prefix, nested=nested):
        cells = [f"`{key}`", kind(field), default(field), built(key, field), field.description or ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def keys(section: type[BaseModel], prefix: str, *, nested: bool) -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted key, field), depth first."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield f"{prefix}{name}", field
        elif nested:
            yield from keys(inner, f"{prefix}{name}.", nested=True)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Give the section that a field holds, or None where it holds a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Give the members of a union; another type is its only member."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def choices(annotation: Any) -> list[Any]:
    """List the values that a field names one by one, in lists of them too."""
    inner = [item for item in alternatives(annotation) if get_origin(item) is tuple]
    found = [value for item in alternatives(annotation) if get_origin(item) is Literal for value in get_args(item)]
    return found + [value for item in inner for value in choices(get_args(item)[0])]


def kind(field: FieldInfo) -> str:
    """Say what a value may be."""
    bounds = " and ".join(
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(bound, name)
    )
    words = [word for item in alternatives(field.annotation) if (word := type_name(item, bounds))]
    return " or ".join(words)


def type_name(annotation: Any, bounds: str) -> str:
    """Say what a value of one type is."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        return (
            f"list of {type_name(item, '')}"
            if get_origin(item) is Literal or item in (str, int)
            else "list of mappings"
        )
    if get_origin(annotation) is dict:
        return "mapping of names"
    if annotation is types.NoneType:
        return "`null`"
    return f"{NAMES[annotation]} {bounds if annotation in (int, float) else ''}".strip()


def default(field: FieldInfo) -> str:
    """Write the default as YAML would."""
    return (
        "required" if field.default is PydanticUndefined else f"`{json.dumps(field.default, ensure_ascii=False)}`"
    )


def built(key: str, field: FieldInfo) -> str:
    """Try the values of a key; say which are refused as not built."""
    named = choices(field.annotation)
    others = [value for item in alternatives(field.annotation) for value in samples(item, field)]
    refused = [value for value in [*named, *others] if NOT_BUILT in complaint(key, field, value)]
    if not refused:
        return "yes"
    if len(refused) == len([*named, *others]) - (field.default in named):
        return f"`{field.default}` only" if field.default in named else "not yet"
    words = [f"`{json.dumps(value) if isinstance(value, bool) else value}`" for value in refused]
    return f"not {', '.join(words)}"


def samples(annotation: Any, field: FieldInfo) -> list[Any]:
    """Give values of a type that names none, other than the default."""
    if annotation is bool:
        return [not field.default]
    if annotation in (int, float):
        known = isinstance(field.default, int | float) and not isinstance(field.default, bool)
        return [field.default + 1 if known else 1]
    if annotation is str:
        return ["x"]
    return [FAULT] if get_origin(annotation) is tuple and not choices(annotation) else []


def complaint(key: str, field: FieldInfo, value: Any) -> str:
    """Say what is wrong with a small configuration in which one key is set."""
    tree: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"train": ["a.jsonl"]}}
    *sections, name = key.split(".")
    branch = tree
    for section in sections:
        branch = branch.setdefault(section, {})
    is_list = any(get_origin(item) is tuple for item in alternatives(field.annotation))
    branch[name] = [value] if is_list else value
    try:
        parse_config(tree)
    except ConfigError as error:
        return error.what
    return ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    BASELINES.write_text(baselines(BASELINES.read_text(encoding="utf-8")), encoding="utf-8")
