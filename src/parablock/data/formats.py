"""Data formats, detected by field names, and their rows as conversations.

    messages           messages: [{role, content}, …], and perhaps tools and system
    sharegpt           conversations: [{from, value}, …], and perhaps tools and system
    prompt_completion  prompt, completion: texts, or lists of turns
    alpaca             instruction, output, and perhaps input and system
    input_output       input, output
    gsm8k              question, answer
    text               text

A row of all formats but `text` is a conversation.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from parablock.data.conversations import Conversation, Message, check_text, converse, kind_of, read_turns
from parablock.data.file_kinds import rows_out_of, suffix_of
from parablock.data.sources import Row
from parablock.data.switches import SWITCHES, is_nothing, is_off
from parablock.errors import DataError
from parablock.printable import counted

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "input_output": ("input", "output"),
    "gsm8k": ("question", "answer"),
    "text": ("text",),
}
"""Format → the fields that a row of it must have."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools", "system"),
    "sharegpt": ("tools", "system"),
    "prompt_completion": ("tools", "system"),
    "alpaca": ("input", "system"),
    "text": (),
}
"""Format → the fields that a row of it may have; of others, `system`."""

COLUMNS = tuple(dict.fromkeys(name for table in (FORMATS, OPTIONAL) for names in table.values() for name in names))
"""All fields that some format reads."""

EMPTY_CELLS = ("NaN", "nan", "NA", "<NA>", "#N/A", "NULL")
"""How pandas, R, spreadsheets and SQL write a cell without a value into a text file."""

_WEAK = ("text", "input_output")
"""Formats that do not count beside another one, in this order."""


def _optional(data_format: str) -> tuple[str, ...]:
    return OPTIONAL.get(data_format, ("system",))


def detect_format(rows: Sequence[Row]) -> str:
    """Return the one format that all rows (at least one) have: a key of `FORMATS`.

    Fields of `text` or `input_output` beside those of another format do not count.

    Raises:
        DataError: A row fits no format or more than one, or two rows differ; names file, line and fields.
    """
    found = _format_of(rows[0])
    for row in rows[1:]:
        other = _format_of(row)
        if other != found:
            raise DataError(
                f"{row.place} has the format {other} (fields {_fields(row)}), but {rows[0].place} has {found} "
                f"(fields {_fields(rows[0])}).",
                remedy="Bring all rows of a source into one format.",
            )
    return found


def formats_by_source(rows: Iterable[Row], data_format: str) -> dict[str, str]:
    """Return the format of each source: the given one or, with `auto`, what its rows have; see `detect_format`.

    Raises:
        DataError: As `check_rows`, where the rows of a source are not of one format.
    """
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    if data_format != "auto":
        return dict.fromkeys(by_source, data_format)
    try:
        return {source: detect_format(of_source) for source, of_source in by_source.items()}
    except DataError:
        for of_source in by_source.values():
            check_rows(of_source, data_format)  # an earlier row may be wrong in itself
        raise


def check_format(data_format: str) -> None:
    """Raise a DataError unless there is such a format, or it is `auto`."""
    if data_format not in ("auto", *FORMATS):
        raise DataError(f"Unknown format {data_format!r}.", remedy=f"Known are auto, {', '.join(FORMATS)}.")


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse columns of a field that no format has, and one column for two fields, with a ValueError."""
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"no format has a field {name!r}{meant}; known are {', '.join(COLUMNS)}")
    for column in columns.values():
        if len(same := [name for name, value in columns.items() if value == column]) > 1:
            raise ValueError(
                f"the fields {' and '.join(same)} are both column {column!r}; each needs one of its own"
            )


def check_rows(rows: Sequence[Row], data_format: str) -> None:
    """Read every row as the format has it, in order; the first wrong one, or no such format, raises a DataError."""
    check_format(data_format)
    for source_rows in _runs(rows):
        name = _format_of(source_rows[0]) if data_format == "auto" else data_format
        for row in source_rows:
            if data_format == "auto" and _format_of(row) != name:
                detect_format(source_rows)
            if name == "text":
                read_text(row)
                is_off(row)
            else:
                read_conversation(row, name)


def read_conversation(row: Row, data_format: str) -> Conversation:
    """Return a row of any format but `text` as turns, of which the assistant's are learnt.

    Raises:
        DataError: A field is missing or is not what the format has there.
    """
    system = _read_text_field(row, "system", data_format) if not is_nothing(row.fields.get("system")) else ""
    tools = row.fields.get("tools") if "tools" in _optional(data_format) else None
    if data_format in ("messages", "sharegpt"):
        (name,) = FORMATS[data_format]
        if row.fields.get(name) is None:
            raise _missing(row, name, data_format)
        return converse(row, read_turns(row, name), system=system, tools=tools)
    prompt_name, completion_name = FORMATS[data_format]
    prompt = _read_side(row, prompt_name, data_format, "user")
    completion = _read_side(row, completion_name, data_format, "assistant")
    if data_format == "alpaca" and (context := _read_alpaca_input(row)):
        prompt[0]["content"] += f"\n\n{context}"
    learnt = [False] * len(prompt) + [True] * len(completion)
    return converse(row, [*prompt, *completion], learnt=learnt, system=system, tools=tools)


def _read_alpaca_input(row: Row) -> str:
    """Return the optional context of an Alpaca row; empty if there is none."""
    return _read_text_field(row, "input", "alpaca") if not is_nothing(row.fields.get("input")) else ""


def read_text(row: Row) -> str:
    """Return the text of a row of format `text`."""
    return _read_text_field(row, "text", "text")


def unused_fields(row: Row, data_format: str) -> list[str]:
    """Return the fields of a row that its format does not read."""
    used = {*FORMATS[data_format], *_optional(data_format), *SWITCHES}
    return [name for name, value in row.fields.items() if name not in used and not is_nothing(value)]


def warn_of_empty_cells(rows: Sequence[Row], data_format: str) -> list[str]:
    """Warn of words that other software writes for a cell with nothing in it, and that are learnt as words here."""
    format_of = formats_by_source(rows, data_format)
    found = Counter(
        (name, value.strip())
        for row in rows
        for name in (*FORMATS[format_of[row.source]], *_optional(format_of[row.source]))
        if isinstance(value := row.fields.get(name), str) and value.strip() in EMPTY_CELLS
    )
    return [
        f"warning: {name} is {word!r} in {counted(count, 'row')}, which is learnt as that word; "
        "if nothing is meant, leave the cell empty"
        for (name, word), count in found.most_common()
    ]


def repeated_rows(
    rows: Iterable[Row], known: Iterable[Row], *, data_format: str, known_format: str | None = None
) -> list[Row]:
    """Return the rows that say what a known row says: the same turns or text, whichever fields hold them.

    Args:
        rows: The rows in question.
        known: The rows to compare with; those of which nothing is learnt do not count.
        data_format: How rows are read: `auto`, or a key of `FORMATS`.
        known_format: How known rows are read; None: as the others.
    """
    said = (_said_by(row, known_format or data_format) for row in known)
    seen = {text for text, is_learnt in said if is_learnt}
    return [row for row in rows if _said_by(row, data_format)[0] in seen]


def _said_by(row: Row, data_format: str) -> tuple[bytes, bool]:
    """Hash what a row says, or its fields if the format cannot read it; and tell whether any of it is learnt."""
    said, is_learnt = cast("Any", row.fields), True
    with suppress(DataError):
        name = _format_of(row) if data_format == "auto" else data_format
        if name == "text":
            said, is_learnt = read_text(row), not is_off(row)
        else:
            conversation = read_conversation(row, name)
            said, is_learnt = (conversation.turns, conversation.tools), any(conversation.learnt)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=repr).encode()).digest(), is_learnt


def replace_completion(row: Row, completion: str, *, data_format: str) -> Row:
    """Return a copy of a row with another completion (in turns: another last assistant turn).

    The format `auto` is detected.

    Raises:
        DataError: The row has no prompt apart from its completion (format `text`, no assistant turn).
    """
    data_format = _format_of(row) if data_format == "auto" else data_format
    name = FORMATS[data_format][-1]
    if data_format not in ("messages", "sharegpt", "text") and isinstance(row.fields.get(name), str):
        return replace(row, fields={**row.fields, name: completion})
    turns = [] if data_format == "text" else read_turns(row, name)  # a copy
    for turn in reversed(turns):
        if turn["role"] == "assistant":
            turn["content"] = completion
            return replace(row, fields={**row.fields, name: turns})
    raise DataError(
        f"{row.place} has no completion that could be replaced by another one.",
        remedy="Multiple choice needs rows with a prompt and a completion.",
    )


def _runs(rows: Sequence[Row]) -> list[list[Row]]:
    """Group neighbouring rows of one source."""
    runs: list[list[Row]] = []
    for row in rows:
        if runs and runs[-1][0].source == row.source:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _format_of(row: Row) -> str:
    present = {name for name, value in row.fields.items() if not is_nothing(value)}
    fits = [name for name, needed in FORMATS.items() if present.issuperset(needed)]
    for weak in _WEAK:
        if len(fits) > 1:
            fits = [name for name in fits if name != weak]
    if len(fits) != 1:
        problem = f"fits more than one format ({', '.join(fits)})" if fits else "fits no known format"
        within = "" if fits else f"{_other_spelling(row)}{_list_inside(row)}"
        remedy = f"{_list_formats()} Or set data.format, or name its columns in data.columns. {within}"
        raise DataError(
            f"{row.place} {problem}: it has the fields {_fields(row)}.", cause=_nulls(row), remedy=remedy.rstrip()
        )
    return fits[0]


def _nulls(row: Row) -> str:
    """Say which fields of some format have no value; "" if none."""
    nulls = [name for name, value in row.fields.items() if name in COLUMNS and is_nothing(value)]
    if not nulls:
        return ""
    return f"A field that is null or NaN counts as none: give {', '.join(nulls)} a text, or leave the row out."


def _other_spelling(row: Row) -> str:
    """Return the advice for fields that are spelt almost as those of a format; "" without one."""
    plain = {name.strip().lower(): name for name in row.fields if name not in COLUMNS}
    same = {name: plain[name] for name in COLUMNS if name in plain and name not in row.fields}
    if same:
        columns = yaml.safe_dump(same, default_flow_style=True, allow_unicode=True, width=1000).strip()
        return f"Capitals and blanks count: data.columns: {columns} "
    pairs = [(name, difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.75)) for name in plain.values()]
    near = [f"{found[0]} for {name!r}" for name, found in pairs if found and found[0] not in row.fields]
    return f"Did you mean {', '.join(near)}? " if near else ""


def _list_inside(row: Row) -> str:
    """Return the advice for a list of objects in an unknown field: it is the turns, or the rows; "" without one."""
    lists = {name: value for name, value in row.fields.items() if isinstance(value, list) and name not in COLUMNS}
    objects = {name: value[0] for name, value in lists.items() if value and isinstance(value[0], dict)}
    for name, first in objects.items():
        if not {"role", "from"}.isdisjoint(first):
            columns = yaml.safe_dump({"messages": name}, default_flow_style=True, allow_unicode=True, width=1000)
            return f"For the turns in {name!r}: data.columns: {columns.strip()}"
    is_json = suffix_of(Path(row.source)) in (".json", ".jsonl", ".ndjson")
    return rows_out_of(row.source, next(iter(objects))) if objects and is_json else ""


def _read_side(row: Row, name: str, data_format: str, role: str) -> list[Message]:
    """Return the turns of a prompt or a completion; a text is one turn of that role."""
    if data_format == "prompt_completion" and isinstance(row.fields.get(name), list):
        return read_turns(row, name)
    return [{"role": role, "content": _read_text_field(row, name, data_format)}]


def _read_text_field(row: Row, name: str, data_format: str) -> str:
    value = row.fields.get(name)
    if value is None:
        raise _missing(row, name, data_format)
    if not isinstance(value, str):
        raise DataError(f"{row.place}: field {name} is {kind_of(value)}, not text.", remedy="Write it as a string.")
    return check_text(row, f"field {name}", value)


def _missing(row: Row, name: str, data_format: str) -> DataError:
    return DataError(
        f"{row.place} has no value in field {name}, which the format {data_format} needs; it has the fields "
        f"{_fields(row)}.",
        remedy=_list_formats(),
    )


def _fields(row: Row) -> str:
    named = (
        f"{name} ({'null' if value is None else 'NaN'})" if is_nothing(value) else name
        for name, value in row.fields.items()
    )
    return ", ".join(named) or "(none)"


def _list_formats() -> str:
    return "Formats need: " + "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items()) + "."
