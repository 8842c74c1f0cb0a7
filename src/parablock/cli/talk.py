"""`parablock chat` and `parablock generate`: talk to the tuned model, with the base model beside it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from parablock.cli.output import say, say_whole
from parablock.cli.show_data import columns_of
from parablock.cli.terminal import INTERRUPTED, LOADING, check_model, console, show_work
from parablock.errors import DataError
from parablock.printable import printable

if TYPE_CHECKING:
    from parablock.evaluation.conversation import Dialogue
    from parablock.experiment.progress import Progress

Model = Annotated[str, typer.Argument(help="A run directory, or a Hugging Face folder or id.")]
Only = Annotated[Literal["base", "tuned"] | None, typer.Option(help="One model of a run; default: both.")]
System = Annotated[str, typer.Option(help="A system prompt, for models whose template has a place for it.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
LEAST_TEMPERATURE = 1e-4
"""What is divided by less than this does not stay finite."""


def _drawable(temperature: float) -> float:
    if temperature and not LEAST_TEMPERATURE <= temperature < math.inf:  # nan neither
        raise typer.BadParameter(f"{temperature} draws no token; give 0, or {LEAST_TEMPERATURE} or more")
    return temperature


Temperature = Annotated[
    float,
    typer.Option(min=0, callback=_drawable, help="0: the likeliest token; above 0: tokens are drawn."),
]
Seed = Annotated[int, typer.Option(help="Answers that are drawn follow from it.")]
QUITTING = ("/quit", "/exit")
COMMANDS = ("/new", "/help", *QUITTING)
HELP = "/new begins anew, /quit or Ctrl-D ends; Ctrl-C cuts an answer short"


def chat(
    model_or_run_dir: Model,
    only: Only = None,
    system: System = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk to the tuned model of a run, with the base model beside it; or to any model.

    Each model sees its own answers of earlier turns, if its chat template has a place for them.

    Example: parablock chat runs/t0
    """
    with show_work() as progress:
        check_model(model_or_run_dir)
        progress.stage(LOADING, is_brief=True)
        from parablock.evaluation.conversation import Dialogue, open_speakers

        _legible(system, "--system")
        _warn_of_changes(model_or_run_dir, progress)
        speakers = open_speakers(model_or_run_dir, only=only, tell=progress.stage)
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        notes: dict[str, None] = {}
        conversations = [
            Dialogue(speaker, system=system, on_cut=notes.setdefault, **settings) for speaker in speakers
        ]
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        console.print(HELP, style="dim", highlight=False)
        if not all(speaker.has_memory for speaker in speakers):
            text = "the model has learnt single prompts: it does not see earlier turns"
            console.print(text, style="dim", highlight=False)
    for text in _turns():
        if text == "/new":
            for conversation in conversations:
                conversation.forget()
        elif told := _wrong_command(text):
            if is_terminal:
                console.print(told, style="dim", highlight=False)
            else:
                say(told, err=True)  # it is no answer
        elif text:
            _answer(conversations, text)
        for note in notes:
            say(f"note: {note}", err=True)
        notes.clear()


def _wrong_command(text: str) -> str:
    """Say what is wrong with a line that is meant as a command, and is none; "" for a prompt.

    A line is meant as a command if it is one word that begins with a slash, and no path; or if it begins with one.
    """
    if not text.startswith("/"):
        return ""
    word, *rest = text.split(maxsplit=1)
    name = f"/{word.lstrip('/').lower()}"
    if name.count("/") > 1 or (rest and name not in COMMANDS):
        return ""
    if name == "/help" and not rest:
        return HELP
    wrong = f"{name} takes nothing behind it" if rest and word == name else f"{word:.40} is no command"
    return f"{wrong}; nothing was asked: {HELP}"


def _warn_of_changes(model_or_run_dir: str, progress: Progress) -> None:
    from parablock.evaluation.side_by_side import changed_weights

    progress.stage("comparing the weights with the record of the run", is_brief=True)
    if changed := changed_weights(model_or_run_dir):
        progress.message(f"warning: {changed}")


def _turns() -> Iterator[str]:
    """Yield what the user says: lines with a prompt on a terminal, else the lines of standard input."""
    if not sys.stdin.isatty():
        encoding = sys.stdin.encoding or "utf-8"
        for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), 1):
            text = line.decode(encoding, "surrogateescape") if isinstance(line, bytes) else line
            text = _legible(text.strip(), f"line {number} of standard input")
            if text in QUITTING:
                return
            yield text
        return
    import readline  # noqa: F401  the input line can be edited, and earlier ones come back

    while True:
        try:
            text = _legible(input("> ").strip(), "the line")  # shown by readline, which so knows where it begins
        except (UnicodeDecodeError, DataError):
            say("That is not UTF-8, as this terminal is said to write; nothing was asked.", err=True)
            continue
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            raise typer.Exit(INTERRUPTED) from None
        if text in QUITTING:
            return
        yield text


def _legible(text: str, what: str) -> str:
    """Return a text unless it has bytes that are none in its encoding, which Python keeps as surrogates."""
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise DataError(
            f"{what} is not in UTF-8: {text[:80]!r}",
            cause="It is of another encoding, such as Latin-1 or UTF-16.",
            remedy="Convert it first, such as with: iconv -f latin1 -t utf-8",
        )
    return text


def _answer(conversations: list[Dialogue], text: str) -> None:
    """Show the answers while they come, those of two models side by side on a terminal."""
    answers = {conversation.speaker.label: "" for conversation in conversations}

    def hear(label: str, piece: str) -> None:
        answers[label] += piece

    try:
        with _shown(answers):
            for conversation in conversations:
                label = conversation.speaker.label
                answer = conversation.ask(text, partial(hear, label))
                answers[label] = _with_its_end(answer, conversation.cut_at)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():  # nobody is there to ask something else
            say("stopped at once; the last line has no answer", err=True)
            raise typer.Exit(INTERRUPTED) from None
        console.print("(cut short; the turn is forgotten)", style="dim")


def _with_its_end(answer: str, cut_at: int | None) -> str:
    return f"{answer.rstrip()} … (cut at {cut_at} tokens)" if cut_at else answer


@contextmanager
def _shown(answers: dict[str, str]) -> Iterator[None]:
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(_Columns(answers), console=console, refresh_per_second=8, transient=True):
            yield
        console.print(_Columns(answers, is_done=True))
    else:
        yield
        for label, answer in answers.items():
            said = printable(answer.strip())
            console.print_as_it_is(f"{label}: {said}" if len(answers) > 1 else said)


class _Columns:
    """The answers so far, a column for each model; a spinner turns where none has come yet, until all is said."""

    def __init__(self, answers: dict[str, str], *, is_done: bool = False) -> None:
        self._answers, self._is_done = answers, is_done
        is_ascii = not console.encoding.lower().startswith("utf")
        self._spinner = Spinner("line" if is_ascii else "dots")

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in self._answers:
            table.add_column(ratio=1, overflow="fold")
        if len(self._answers) > 1:
            table.add_row(*(Text(label, style="bold") for label in self._answers))
        nothing = Text("(nothing)", style="dim") if self._is_done else self._spinner
        said = [printable(text.strip()) for text in self._answers.values()]
        table.add_row(*(Text(text) if text else nothing for text in said))
        return table


def generate(
    model_or_run_dir: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help="A file of prompts: rows as of a run, or a .txt file with one a line; repeatable."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="field=column, as data.columns; default: as in the run. Repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines to this file instead.")] = None,
    output_format: Annotated[
        Literal["plain", "jsonl"], typer.Option("--format", help="What is printed.")
    ] = "plain",
    only: Only = None,
    system: System = "",
    max_new_tokens: MaxNewTokens = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")] = 16,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Answer prompts with the base model and the tuned one of a run, or with any model.

    A line of JSON has the prompt, the answer of each model (base, tuned or model), where --max-new-tokens cut it
    (base_cut_at and so on), and the reference of the row.

    Example: parablock generate runs/t0 "What is 2 + 2?" --data prompts.jsonl --output answers.jsonl
    """
    with show_work() as progress:
        from parablock.errors import DataError

        if not prompts and not data:
            raise DataError(
                "There is no prompt.", remedy='Give one, such as "What is 2 + 2?", or a file with --data.'
            )
        named = columns_of(columns)
        if named and not data:
            raise typer.BadParameter("--column is for the rows of --data; leave it out")
        check_model(model_or_run_dir)
        from parablock.storage.files import check_writable_file, write_atomically

        if output is not None:
            check_writable_file(output, "--output")
        progress.stage(LOADING, is_brief=True)
        from parablock.evaluation.conversation import (
            answer_prompts,
            columns_of_run,
            labelled,
            open_speakers,
            read_prompts,
        )

        given = [_legible(text, f"prompt {number}") for number, text in enumerate(prompts or [], 1)]
        asked = read_prompts(given, data or [], columns=named, of_run=columns_of_run(model_or_run_dir))
        _legible(system, "--system")
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        _warn_of_changes(model_or_run_dir, progress)
        answers: dict[str, list[str]] = {}
        cut: dict[str, dict[int, int]] = {}
        for speaker in open_speakers(model_or_run_dir, only=only, tell=progress.stage):
            progress.stage(f"{speaker.label} answers", len(asked))
            ends = cut[speaker.label] = {}
            answers[speaker.label] = answer_prompts(
                speaker,
                asked,
                system=system,
                batch_size=batch_size,
                on_done=progress.done,
                on_endless=lambda place, ends=ends: ends.update({place: max_new_tokens}),
                on_cut=lambda told, label=speaker.label: progress.message(f"note: {label}: {told}"),
                **settings,
            )
    records = list(labelled(asked, answers, cut))
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    if output is not None:
        write_atomically(output, "".join(f"{line}\n" for line in lines))
        say(f"{len(records)} prompt{'s' * (len(records) != 1)} answered: {output}", err=True)
    elif output_format == "jsonl":
        for line in lines:
            say_whole(line)
    else:
        for record in records:
            for name, text in record.items():
                if isinstance(text, str):
                    said = _with_its_end(text, record.get(f"{name}_cut_at"))
                    console.print_as_it_is(Text.assemble((f"{name}: ", "bold"), printable(said)))
            console.print()
