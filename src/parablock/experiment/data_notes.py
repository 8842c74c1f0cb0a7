"""The chat template of a run, and notes on its data: who trains on what, and what nothing is learnt from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date

from transformers import PreTrainedTokenizerBase

from parablock.config.data_section import DataSection
from parablock.data.formats import formats_by_source, repeated_rows, warn_of_empty_cells
from parablock.data.histogram import partition_histogram
from parablock.data.prompts import Tokenized
from parablock.data.sources import Row
from parablock.data.templates import DATE_CALL, plain_template
from parablock.evaluation.choices import CHOICES_FIELD, GROUP_FIELD
from parablock.printable import counted


def settle_template(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], data_format: str, day: str | None = None
) -> tuple[str | None, list[str]]:
    """Give a tokenizer without a chat template one, and find the day that a template writes which asks for it.

    Returns:
        The given day, or today if there is none and the template writes it; and notes for the user.
    """
    notes = []
    formats = set(formats_by_source(rows, data_format).values()) - {"text"}
    if tokenizer.chat_template is None and formats:
        tokenizer.chat_template = plain_template(tokenizer, formats.pop() if len(formats) == 1 else "messages")
        turns = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
        shown = tokenizer.apply_chat_template(turns, tokenize=False)
        notes.append(f"the model has no chat template: rows are written as {shown!r}, and so it is saved")
    if DATE_CALL in str(tokenizer.chat_template) and day is None:
        day = date.today().isoformat()
        notes.append(f"the chat template writes the day: {day} in all of this run (data.date)")
    return day, notes


def describe_data(
    parts: Sequence[Sequence[Row]], train: Sequence[Tokenized], test: Tokenized, data: DataSection
) -> list[str]:
    """Describe the training data of each client, and the rows that are left out, in lines of text.

    Args:
        parts: The training rows of each client.
        train: The same, tokenized.
        test: The test rows, tokenized.
        data: The section of the configuration.
    """
    if not any(parts):
        return [f"{counted(len(parts), 'client')}, with rows of their own", f"test: {test.summary()}"]
    field = data.partition.field
    examples = [example.row for part in (*train, test) for example in part.examples]
    return [
        *partition_histogram(parts, field=field),
        *(f"client {i}: {part.summary()}" for i, part in enumerate(train) if len(train) <= 20 or part.skipped),
        f"test: {test.summary()}",
        *describe_skipped(train),
        *describe_unused([*train, test], field),
        *warn_of_empty_cells(examples, data.format),
    ]


def describe_skipped(parts: Sequence[Tokenized], what: str = "not trained on") -> list[str]:
    """Name the first rows that are left out, each with the reason, and the number of the others."""
    skipped = [entry for part in parts for entry in part.skipped]
    more = [f"… and {len(skipped) - 5} more"] if len(skipped) > 5 else []
    return [*(f"{what}: {entry.row.place}: {entry.reason}" for entry in skipped[:5]), *more]


def describe_unused(parts: Sequence[Tokenized], field: str | None = None) -> list[str]:
    """Say what rows have and nothing is learnt from, with the number of rows."""
    unused = sum((part.unused for part in parts), Counter[str]())
    for name in (field, CHOICES_FIELD, GROUP_FIELD):  # the partition and the tasks of `eval` read them
        del unused[f"field {name}"]
    counts = [f"{what} ({count} row{'s' * (count != 1)})" for what, count in unused.most_common()]
    return [f"not used: {'; '.join(counts)}"] if counts else []


def warn_of_repeats(held_out: Sequence[Row], train: Sequence[Row], data_format: str) -> list[str]:
    """Warn of test rows that are trained on, which make the loss look better than it is."""
    repeated = repeated_rows(held_out, train, data_format=data_format)
    if not repeated:
        return []
    return [
        f"warning: {len(repeated)} of {len(held_out)} test rows stand in the training rows too, the first in "
        f"{repeated[0].place}; the eval loss does not say how the model does on new text"
    ]
