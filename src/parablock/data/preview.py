"""A look at rows as the model will see them: their text, in stretches that are learnt or only read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from parablock.data.conversations import Message, says_something
from parablock.data.formats import (
    formats_by_source,
    read_conversation,
    read_text,
    unused_fields,
    warn_of_empty_cells,
)
from parablock.data.prompts import IGNORED_LABEL, Example
from parablock.data.sources import Row
from parablock.data.switches import is_off
from parablock.printable import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a row's text, and whether the loss counts it."""

    text: str
    is_learnt: bool


def stretches_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Stretch]:
    """Return the text of a tokenized row, cut where learning begins and ends; what was cut off is not in it."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    return [
        Stretch(tokenizer.decode([token for token, _ in group]), is_learnt)
        for is_learnt, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED_LABEL)
    ]


def turns_of(rows: Sequence[Row], data_format: str) -> list[list[Stretch]]:
    """Return the turns of rows as they are without a model; a text is one stretch."""
    format_of = formats_by_source(rows, data_format)
    return [_turns(row, format_of[row.source]) for row in rows]


def notes_without_a_model(rows: Sequence[Row], data_format: str) -> list[str]:
    """Say which fields no format reads, and which words may stand for an empty cell, in lines of text."""
    format_of = formats_by_source(rows, data_format)
    unused = Counter(name for row in rows for name in unused_fields(row, format_of[row.source]))
    counts = [f"field {name} ({counted(count, 'row')})" for name, count in unused.most_common()]
    said = [f"not used: {'; '.join(counts)}"] if counts else []
    return said + warn_of_empty_cells(rows, data_format)


def _turns(row: Row, data_format: str) -> list[Stretch]:
    if data_format == "text":
        return [Stretch(read_text(row), not is_off(row))]
    conversation = read_conversation(row, data_format)
    return [
        Stretch(f"{turn['role']}: {_said(turn)}\n", is_learnt and says_something(turn))
        for turn, is_learnt in zip(conversation.turns, conversation.learnt, strict=True)
    ]


def _said(turn: Message) -> str:
    calls = "".join(f" {call}" for call in turn.get("tool_calls", ()))
    return f"{turn['content']}{calls}"
