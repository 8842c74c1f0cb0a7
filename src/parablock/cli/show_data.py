"""The command `parablock data`: rows as the model will see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from parablock.cli.output import say
from parablock.cli.terminal import LOADING, console, show_work
from parablock.errors import ConfigError
from parablock.printable import counted, printable

if TYPE_CHECKING:
    from parablock.data.preview import Stretch
    from parablock.data.sources import Row
    from parablock.experiment.progress import Progress


def data(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, patterns, or names of the hub.")],
    model: Annotated[str, typer.Option(help="Its tokenizer and chat template; without one: turns only.")] = "",
    rows: Annotated[int, typer.Option(min=0, help="Rows to show of each file.")] = 2,
    data_format: Annotated[str, typer.Option("--format", help="As data.format.")] = "auto",
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="field=column, as data.columns; repeatable.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="As data.max_length.")] = 512,
) -> None:
    """Show rows as the model will see them, with what is learnt marked, and say what is not used.

    Example: parablock data train.jsonl --model Qwen/Qwen3-0.6B
    """
    with show_work() as progress:
        progress.stage("reading the files", is_brief=True)
        from parablock.data.formats import check_rows
        from parablock.data.sources import describe_ignored, load_files

        named = columns_of(columns)
        check = partial(check_rows, data_format=data_format)
        files = [
            rows for source in sources for rows in load_files(source, split="train", columns=named, check=check)
        ]
        ignored = [line for source in sources for line in describe_ignored(source, split="train")]
        lines = list(
            _tokens(files, model, rows, data_format, max_length, progress)
            if model
            else _turns(files, rows, data_format)
        )
        lines += [(line, None) for line in ignored]
    say(f"learnt is what is {'green' if console.is_terminal else 'between [[ and ]]'}")
    for title, stretches in lines:
        say(title)
        if stretches is not None:
            _show(stretches)


Shown = tuple[str, "Sequence[Stretch] | None"]
"""A line, and what stands below it."""


def _turns(files: list[list[Row]], rows: int, data_format: str) -> Iterator[Shown]:
    from parablock.data.preview import notes_without_a_model, turns_of

    for file in files:
        for row, turns in zip(file[:rows], turns_of(file[:rows], data_format), strict=True):
            yield row.place, turns
        yield f"{file[0].source}: {counted(len(file), 'row')}", None
        for line in notes_without_a_model(file, data_format):
            yield line, None


def _tokens(
    files: list[list[Row]], model: str, rows: int, data_format: str, max_length: int, progress: Progress
) -> Iterator[Shown]:
    progress.stage(LOADING, is_brief=True)
    from parablock.data.formats import warn_of_empty_cells
    from parablock.data.preview import stretches_of
    from parablock.data.prompts import tokenize_rows
    from parablock.experiment.data_notes import describe_skipped, describe_unused, settle_template
    from parablock.model.pretrained import load_tokenizer

    progress.stage("loading the tokenizer", is_brief=True)
    tokenizer = load_tokenizer(model)
    every = [row for file in files for row in file]
    day, notes = settle_template(tokenizer, every, data_format)
    for note in notes:
        yield note, None
    for file in files:
        progress.stage(f"reading {file[0].source} as the model does", is_brief=True)
        tokenized = tokenize_rows(
            file, tokenizer, data_format=data_format, max_length=max_length, completion_only_loss=True, date=day
        )
        for example in tokenized.examples[:rows]:
            counts = f"{len(example.input_ids)} tokens, {example.num_target_tokens} learnt"
            cut = ", cut at the end" if example.is_truncated else ""
            yield f"{example.row.place}: {counts}{cut}", stretches_of(example, tokenizer)
        yield f"{file[0].source}: {tokenized.summary()}", None
        examples = [example.row for example in tokenized.examples]
        notes = [*describe_skipped([tokenized]), *describe_unused([tokenized])]
        notes += warn_of_empty_cells(examples, data_format)
        for line in notes:
            yield line, None


def _show(stretches: Sequence[Stretch]) -> None:
    """Print a row; what is learnt is green on a terminal, and between brackets elsewhere."""
    text = Text()
    for stretch in stretches:
        shown = printable(stretch.text)
        if stretch.is_learnt and not console.is_terminal:
            text.append(f"[[{shown}]]")
        else:
            text.append(shown, style="bold green" if stretch.is_learnt else "")
    console.print_as_it_is(text)


def columns_of(columns: list[str] | None) -> dict[str, str]:
    """Return what `--column field=column` says, as a mapping; a ConfigError names what is wrong."""
    from parablock.data.formats import check_columns

    pairs = [_pair(column) for column in columns or []]
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        given = ", ".join(f"{name}={value}" for name, value in pairs if name == twice[0])
        raise ConfigError([f"{twice[0]} is given {names.count(twice[0])} times: {given}"], source="--column")
    try:
        check_columns(dict(pairs))
    except ValueError as error:
        raise ConfigError([str(error)], source="--column") from None
    return dict(pairs)


def _pair(column: str) -> tuple[str, str]:
    name, equals, value = column.partition("=")
    if not (name and equals and value):
        raise ConfigError([f"{column!r} is not field=column, such as prompt=frage"], source="--column")
    return name, value
