"""Progress, Ctrl-C and the last lines of the commands that run something, and options that commands share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(markup=False)  # a path may hold brackets
INTERRUPTED = 130
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value; repeatable.")]


@contextmanager
def show_progress() -> Iterator[tuple[Any, Any]]:
    """Show progress. The first Ctrl-C asks the run to stop at the next round, the second one ends it at once.

    Yields:
        The progress display, and a function that returns whether the user asked to stop.
    """
    from parablock.experiment.progress import make_progress

    asked: list[int] = []
    with make_progress(console=console) as progress:

        def on_signal(number: int, frame: object) -> None:
            del frame
            if asked:
                raise KeyboardInterrupt
            asked.append(number)
            progress.message("stopping at the next round and saving; press Ctrl-C again to stop at once")

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield progress, lambda: bool(asked)
        except KeyboardInterrupt:
            progress.message("stopped at once; go on from the last checkpoint with: parablock resume DIR")
            raise typer.Exit(INTERRUPTED) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def print_summary(summary: dict[str, Any], directory: Path) -> None:
    """Print what came of a run, and what to open."""
    exit_when_interrupted(summary, directory)
    console.print(
        f"eval loss {summary['initial_eval_loss']:.4f} → {summary['final_eval_loss']:.4f}; "
        f"{summary['overlap_fraction']:.0%} of the communication was hidden; "
        f"{summary['wall_time_s']:.1f} s ({summary['clock']} clock), "
        f"{summary['sequential_s']:.1f} s one after the other",
        highlight=False,
        soft_wrap=True,
    )
    opened = f"report: {directory / 'report.html'}   model: {directory / 'model'}"
    console.print(opened, highlight=False, soft_wrap=True)


def exit_when_interrupted(summary: dict[str, Any], directory: Path) -> None:
    """Exit with `INTERRUPTED` if the user stopped the run."""
    if summary["status"] == "interrupted":
        remedy = f"stopped and saved; go on with: parablock resume {directory}"
        console.print(remedy, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
