"""Tokenization of rows into token ids and labels, with the prompt masked out of the loss.

The label of a token is its own id, or `IGNORED_LABEL` if the loss ignores it. Prompt and completion are cut as text
(`templates`) and meet at a token boundary. So the mask is exact, and generation starts from exactly the ids that
training saw before the completion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from parablock.data.formats import check_format, detect_format, formats_by_source, replace_completion, unused_fields
from parablock.data.sources import Row
from parablock.data.templates import Rendering, find_stop_token_ids, make_renderer
from parablock.errors import DataError
from parablock.printable import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED_LABEL",
    "Example",
    "Skipped",
    "Tokenized",
    "detect_format",
    "find_stop_token_ids",
    "replace_completion",
    "tokenize_rows",
]

IGNORED_LABEL = -100
"""The label of a token that the loss ignores, as in PyTorch and Transformers."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized row.

    Args:
        input_ids: The whole text, at most `max_length` ids.
        labels: As long as `input_ids`; not shifted, as Transformers models expect them.
        prompt_ids: The prompt for generation: all ids before the last completion, never truncated. For format
            `text`, at most the opening token.
        completion: The last completion as in the row, the reference for generated answers.
        row: The row.
        is_truncated: Whether the right end was cut off to fit `max_length`.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    completion: str
    row: Row
    is_truncated: bool

    @property
    def num_target_tokens(self) -> int:
        """Number of tokens that the loss counts; the first token is never predicted."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


class NothingToLearnError(DataError):
    """Rows that are right, one by one, and none of which has a token to train on."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row without a token to train on, and the reason."""

    row: Row
    reason: str


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The result of tokenizing rows: every row is an example or skipped, in the given order.

    `data_format` is `auto` if the sources of the rows have different formats. `unused` counts the rows that have
    something which no token comes of, in words.
    """

    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]
    data_format: str
    unused: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """Summarize the examples in one line."""
        total = sum(len(example.input_ids) for example in self.examples)
        targets = sum(example.num_target_tokens for example in self.examples)
        truncated = sum(example.is_truncated for example in self.examples)
        name = "mixed formats" if self.data_format == "auto" else self.data_format
        counts = [counted(len(self.examples), "example"), f"{counted(total, 'token')} ({targets:,} with loss)"]
        counts += [f"{truncated} truncated"] if truncated else []
        counts += [f"{len(self.skipped)} skipped ({_reasons(self.skipped)})"] if self.skipped else []
        return f"{name}: {', '.join(counts)}"


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_format: str,
    max_length: int,
    completion_only_loss: bool,
    date: str | None = None,
) -> Tokenized:
    """Tokenize rows; skip those that have no token to train on.

    Args:
        rows: At least one row.
        tokenizer: The model's tokenizer.
        data_format: A key of `FORMATS`, or `auto` to detect the format of each source.
        max_length: Longest example in tokens; a longer one loses its right end.
        completion_only_loss: Whether the loss counts only assistant turns (for format `text`, the whole text).
        date: The day that a chat template writes which asks for it, as YYYY-MM-DD; None: today.

    Raises:
        DataError: No rows, an unknown format, a row that does not fit it, or no row to train on.
        ModelError: The tokenizer has no end-of-sequence token.
    """
    if not rows:
        raise DataError("There are no rows to tokenize.", remedy="Give a source with at least one example.")
    check_format(data_format)
    format_of = formats_by_source(rows, data_format)
    formats = set(format_of.values())
    render = {name: make_renderer(tokenizer, data_format=name, date=date) for name in formats}
    renderings = [render[format_of[row.source]](row) for row in rows]
    examples, skipped, unused = [], [], Counter[str]()
    for row, rendering, pieces_ids in zip(rows, renderings, _encode(renderings, tokenizer), strict=True):
        unused.update(f"field {name}" for name in unused_fields(row, format_of[row.source]))
        unused.update(rendering.unused)
        example = _make_example(row, rendering, pieces_ids, max_length, completion_only_loss=completion_only_loss)
        if example.num_target_tokens:
            examples.append(example)
        elif any(piece.is_completion for piece in rendering.pieces):
            skipped.append(Skipped(row, f"the prompt alone fills max_length {max_length}"))
        else:
            skipped.append(Skipped(row, rendering.nothing))
    if not examples:
        raise NothingToLearnError(
            f"None of {counted(len(rows), 'row')} has anything to train on: {_reasons(skipped)}.",
            remedy="Raise data.max_length, or give rows with completions.",
        )
    return Tokenized(tuple(examples), tuple(skipped), formats.pop() if len(formats) == 1 else "auto", unused)


def _make_example(
    row: Row, rendering: Rendering, pieces_ids: list[list[int]], max_length: int, *, completion_only_loss: bool
) -> Example:
    input_ids: list[int] = []
    labels: list[int] = []
    prompt_length: int | None = None  # the whole text, if it has no completion
    for piece, ids in zip(rendering.pieces, pieces_ids, strict=True):
        if piece.is_completion:
            prompt_length = len(input_ids)
        input_ids += ids
        labels += ids if piece.is_completion or not completion_only_loss else [IGNORED_LABEL] * len(ids)
    return Example(
        input_ids=tuple(input_ids[:max_length]),
        labels=tuple(labels[:max_length]),
        prompt_ids=tuple(input_ids[:prompt_length]),
        completion=rendering.completion,
        row=row,
        is_truncated=len(input_ids) > max_length,
    )


def _encode(renderings: Sequence[Rendering], tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """Tokenize the pieces of every rendering.

    If all cuts fall between tokens of the whole text, the pieces are slices of its ids. If a cut falls inside a
    token, the pieces are tokenized one by one instead.
    """
    texts = [[piece.text for piece in rendering.pieces] for rendering in renderings]
    prefixes_ids = _encode_each([list(accumulate(of_row)) for of_row in texts], tokenizer)
    nested = [all(ids == of_row[-1][: len(ids)] for ids in of_row) for of_row in prefixes_ids]
    apart = iter(
        _encode_each([of_row for of_row, whole in zip(texts, nested, strict=True) if not whole], tokenizer)
    )
    return [
        _differences(of_row) if whole else next(apart) for of_row, whole in zip(prefixes_ids, nested, strict=True)
    ]


def _differences(prefixes_ids: Sequence[list[int]]) -> list[list[int]]:
    return [ids[len(before) :] for before, ids in zip([[], *prefixes_ids], prefixes_ids, strict=False)]


def _encode_each(groups: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """Tokenize all texts of all groups in one call, without adding special tokens."""
    flat = [text for group in groups for text in group]
    if not flat:
        return [[] for _ in groups]
    # verbose=False: no warning about texts longer than the model's context, which are cut later
    ids = iter(tokenizer(flat, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    return [[next(ids) for _ in group] for group in groups]


def _reasons(skipped: Sequence[Skipped]) -> str:
    counts = Counter(item.reason for item in skipped)
    return "; ".join(
        f"{count} because {reason}, first {next(item.row.place for item in skipped if item.reason == reason)}"
        for reason, count in counts.items()
    )
