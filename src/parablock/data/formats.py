"""Data formats: chat messages, prompt and completion, Alpaca, GSM8K and plain text, detected by field names.

    messages           messages: [{role, content}, …]
    prompt_completion  prompt, completion
    alpaca             instruction, output, and perhaps input
    gsm8k              question, answer
    text               text

A row of the first four formats is a conversation; a row of `text` is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from parablock.data.sources import Row
from parablock.errors import DataError

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "gsm8k": ("question", "answer"),
    "text": ("text",),
}
"""Format → the fields that a row of it must have."""

Message = dict[str, str]
"""One turn of a conversation: `role` and `content`."""


def detect_format(rows: Sequence[Row]) -> str:
    """Return the one format that all rows (at least one) have: a key of `FORMATS`.

    A `text` field beside the fields of another format is ignored, as a rendering of the row.

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


def read_conversation(row: Row, data_format: str) -> list[Message]:
    """Return the turns of a row of any format but `text`: a user and an assistant turn, or those of `messages`.

    Raises:
        DataError: A field is missing or is not text, or `messages` is not a list of {role, content}.
    """
    if data_format == "messages":
        return _read_messages(row)
    if data_format == "alpaca":
        instruction, context = _read_text_field(row, "instruction", data_format), read_alpaca_input(row)
        prompt = f"{instruction}\n\n{context}" if context else instruction
    else:
        prompt = _read_text_field(row, FORMATS[data_format][0], data_format)
    completion = _read_text_field(row, FORMATS[data_format][1], data_format)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def read_alpaca_input(row: Row) -> str:
    """Return the optional context of an Alpaca row; empty if there is none."""
    return _read_text_field(row, "input", "alpaca") if row.fields.get("input") is not None else ""


def read_text(row: Row) -> str:
    """Return the text of a row of format `text`."""
    return _read_text_field(row, "text", "text")


def replace_completion(row: Row, completion: str, *, data_format: str) -> Row:
    """Return a copy of a row with another completion (in `messages`: another last assistant turn).

    The format `auto` is detected.

    Raises:
        DataError: The row has no prompt apart from its completion (format `text`, no assistant turn).
    """
    data_format = _format_of(row) if data_format == "auto" else data_format
    if data_format not in ("messages", "text"):
        return replace(row, fields={**row.fields, FORMATS[data_format][1]: completion})
    turns = _read_messages(row) if data_format == "messages" else []  # a copy
    for turn in reversed(turns):
        if turn["role"] == "assistant":
            turn["content"] = completion
            return replace(row, fields={**row.fields, "messages": turns})
    raise DataError(
        f"{row.place} has no completion that could be replaced by another one.",
        remedy="Multiple choice needs rows with a prompt and a completion.",
    )


def _format_of(row: Row) -> str:
    present = {name for name, value in row.fields.items() if value is not None}
    fits = [name for name, needed in FORMATS.items() if present.issuperset(needed)]
    if len(fits) > 1:
        fits = [name for name in fits if name != "text"]
    if len(fits) != 1:
        problem = f"fits more than one format ({', '.join(fits)})" if fits else "fits no known format"
        raise DataError(
            f"{row.place} {problem}: it has the fields {_fields(row)}.",
            remedy=f"{_list_formats()} Or set data.format.",
        )
    return fits[0]


def _read_messages(row: Row) -> list[Message]:
    turns = row.fields.get("messages")
    if turns is None:
        raise _missing(row, "messages", "messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.place}: messages is {_kind(turns)}, not a list of turns.", remedy=_list_formats())
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"{row.place}: turn {number} of messages has no role and content that are text.",
                remedy='Each turn is an object such as {"role": "user", "content": "Hello"}.',
            )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _read_text_field(row: Row, name: str, data_format: str) -> str:
    value = row.fields.get(name)
    if value is None:
        raise _missing(row, name, data_format)
    if not isinstance(value, str):
        raise DataError(f"{row.place}: field {name} is {_kind(value)}, not text.", remedy="Write it as a string.")
    return value


def _missing(row: Row, name: str, data_format: str) -> DataError:
    return DataError(
        f"{row.place} has no value in field {name}, which the format {data_format} needs; it has the fields "
        f"{_fields(row)}.",
        remedy=_list_formats(),
    )


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else f"of type {type(value).__name__}"


def _fields(row: Row) -> str:
    return ", ".join(row.fields) or "(none)"


def _list_formats() -> str:
    return "Formats need: " + "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items()) + "."
