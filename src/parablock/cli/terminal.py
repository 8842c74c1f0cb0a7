"""Progress, Ctrl-C and the last lines of the commands that run something, and options that commands share."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from parablock.cli.output import SafeConsole, say, say_whole
from parablock.cli.word_table import WordTable
from parablock.errors import ConfigError, ParaBlockError
from parablock.printable import as_argument, counted
from parablock.storage import PLAN_NAME

if TYPE_CHECKING:
    from parablock.config.keys import RunConfig
    from parablock.report.tables import Table as Figures

console = SafeConsole()
INTERRUPTED = 130
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command; `nohup` lets it ignore the last, and a script that puts it behind the first."""
RESUME = "parablock resume {}"
MAY_BE_EMPTY = {"--system", "--seeds", "--delays", "--tasks", "--harness"}
"""Options whose empty value says the same as none."""
_COLUMN = {"data.columns": "--column field=column"}
_READING = _COLUMN | {"data.format": "--format", "data.max_length": "--max-length"}
OPTIONS_FOR: dict[str, dict[str, str]] = {
    "init": _COLUMN | {"model.name_or_path": "--model", "federation.num_clients": "--clients"},
    "data": _READING,
    "eval": _COLUMN | {"data.format": "--format"},
    "generate": _COLUMN,
}
"""Command without a configuration → key → the option that takes its place there."""
FOR_ROWS = ("eval", "generate")
"""Commands whose options are for the rows of `--data` alone."""
SAME_COMMAND = "the same command"
"""How one goes on with the run of a server, whose sites a plain `resume` would not have."""
CONFIGURING = "reading the configuration"
LOADING = "loading torch and transformers"
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value; repeatable.")]


@contextmanager
def show_progress(directory: Path, again: str = RESUME) -> Iterator[tuple[Any, Any]]:
    """Show progress. The first Ctrl-C asks the run to stop at the next round, the second one ends it at once.

    SIGTERM, and SIGHUP of a terminal that is closed, count as Ctrl-C. Before the first round there is nothing to
    save, so the first one ends the run.

    Args:
        directory: The run directory, or a folder of runs, which the last lines name.
        again: How one goes on with a run that was stopped.

    Yields:
        The progress display, and a function that returns whether the user asked to stop.
    """
    from parablock.experiment.progress import make_progress

    asked, ended = list[int](), list[int]()
    with make_progress(console=console) as progress:

        def on_signal(number: int, frame: object) -> None:
            del frame
            awaited = progress.awaited()
            if asked or not awaited:
                ended.append(number)
                raise KeyboardInterrupt
            asked.append(number)
            progress.message(f"{awaited}; Ctrl-C stops at once")

        with _signals_to(on_signal):
            try:
                yield progress, lambda: bool(asked)
            except BaseException:  # what a library makes of the interruption of its import, too
                if not ended:
                    raise
                _ignore_signals()
                progress.close()
                say(_after_a_stop(directory, again), err=True)
                _leave(INTERRUPTED)


@contextmanager
def _signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Give the signals that end a command to a handler in the block, except those that are ignored."""
    caught = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def usual_signals() -> None:
    """Take back what `__main__` does with signals, as a command begins; those that are ignored stay so."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _ignore_signals() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)  # the end is near


def refuse_empty_words(words: Sequence[str]) -> None:
    """Refuse an argument or a value that is empty, which as a path would be this folder; a text may be empty."""
    for before, word in pairwise(["", *words]):
        name, equals, value = word.partition("=")
        if (word == "" and before not in MAY_BE_EMPTY) or (
            name.startswith("--") and equals and not value and name not in MAY_BE_EMPTY
        ):
            of = f"of {name or before} " if (name or before).startswith("--") else ""
            raise ConfigError(
                [f"the value {of}is empty; a variable of the shell may not be set"], source="the command line"
            )


def say_options_for(problem: str, words: Sequence[str]) -> None:
    """Name the options of a command line that stand for the keys of a configuration in a problem."""
    options = OPTIONS_FOR.get(next(iter(words), ""), {})
    if words and words[0] in FOR_ROWS and not any(word.partition("=")[0] == "--data" for word in words):
        return
    named = [
        f"{key} is {option}"
        for key, option in options.items()
        if re.search(rf"(?<![\w./-]){re.escape(key)}(?!\.?\w)", problem)  # and no part of a path
    ]
    if named:
        say(f"For this command {', '.join(named)}.", err=True)


def check_model(model_or_run_dir: str) -> None:
    """Refuse a run without a model, and a path where nothing is, before anything slow is imported."""
    from parablock.model.place import find_source
    from parablock.storage.run_directory import RunDirectory

    directory = RunDirectory(model_or_run_dir)
    if directory.config.exists():
        directory.check_has_model()
    else:
        find_source(model_or_run_dir, given_as="")


def check_config(config: RunConfig, output_dir: Path | None) -> None:
    """Refuse a used folder, and a model or data files that are not there, before anything slow is imported."""
    from parablock.data.sources import check_places
    from parablock.model.place import find_source
    from parablock.storage.run_directory import RunDirectory

    if output_dir is not None:
        RunDirectory(output_dir).check_unused()
    find_source(config.model.name_or_path)
    for split, sources in (("train", config.data.train), ("test", config.data.test)):
        check_places(sources, split=split)


def free_directory(parent: Path, name: str) -> Path:
    """Return the first of parent/name, parent/name-2, … that does not exist."""
    places = (parent / (f"{name}-{number}" if number > 1 else name) for number in count(1))
    return next(place for place in places if not place.exists())


def _after_a_stop(directory: Path, again: str) -> str:
    if not (directory / "config.yaml").exists():
        if (directory / PLAN_NAME).exists():
            return f"stopped at once; the comparison goes on with: {again}"
        return "stopped at once; nothing was begun, and nothing is left behind"
    quoted = as_argument(directory)
    with suppress(OSError, ParaBlockError):
        from parablock.storage.run_directory import RunDirectory

        if RunDirectory(directory).read_summary().get("status") == "completed":
            return f"stopped at once; the run is complete; look at it with: parablock eval {quoted}"
    again = again.format(quoted)
    if any((directory / "checkpoints").glob("*")):
        return f"stopped at once; go on from the last checkpoint with: {again}"
    return f"stopped at once, before the first checkpoint; begin again with: {again}"


def _leave(code: int) -> NoReturn:
    """End this process now: threads that compute would be cut in the middle of native code while Python ends."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def print_figures(figures: Figures) -> None:
    """Print a table of figures: fitted to a terminal, and as Markdown with whole lines elsewhere."""
    from parablock.report.tables import to_markdown

    if not console.is_terminal:
        say_whole(to_markdown(figures))
        return
    table = WordTable(*figures.header, narrow=True)
    for row in figures.rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def show_work() -> Iterator[Any]:
    """Show on standard error what a command is at, so that its output can be piped; yield the display.

    A signal ends the command: what it was writing is taken away, and one line says so. Whatever a library makes of
    the interruption, such as an `ImportError`, is the interruption; a second signal waits for nothing.
    """
    from parablock.experiment.progress import make_progress

    asked: list[int] = []
    with make_progress(console=SafeConsole(stderr=True), names_stages=False) as progress:

        def on_signal(number: int, frame: object) -> None:
            del frame
            asked.append(number)
            if len(asked) > 1:
                end("stopped at once")
            raise KeyboardInterrupt

        def end(words: str) -> NoReturn:
            _ignore_signals()
            progress.close()
            say(words, err=True)
            _leave(INTERRUPTED)

        with _signals_to(on_signal):
            try:
                yield progress
            except BaseException:
                if asked:
                    end("stopped at once; nothing half-written is left here")
                raise


def print_summary(summary: dict[str, Any], directory: Path, again: str = RESUME) -> None:
    """Print what came of a run, and what to open; `again` as for `show_progress`."""
    from parablock.report.reading import read_runs
    from parablock.report.tables import sentence

    exit_when_interrupted(summary, directory, again)
    (record,) = read_runs([directory])
    losses = f"eval loss {summary['initial_eval_loss']:.4f} → {summary['final_eval_loss']:.4f}"
    say(losses, sentence(record), f"report: {directory / 'report.html'}   model: {directory / 'model'}")
    if not any((directory / "model").glob("client_*")):
        say(f"talk to it: parablock chat {as_argument(directory)}")


def exit_when_interrupted(summary: dict[str, Any], directory: Path, again: str = RESUME) -> None:
    """Exit with `INTERRUPTED` if the user stopped the run."""
    if summary["status"] == "interrupted":
        done = f"{summary['rounds_done']} of {counted(summary['num_rounds'], 'round')}"
        saved = "saved, with the updates under way" if summary["delay"] and summary["rounds_done"] else "saved"
        say(f"stopped after {done} and {saved}; go on with: {again.format(as_argument(directory))}", err=True)
        raise typer.Exit(INTERRUPTED)
