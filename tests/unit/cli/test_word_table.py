"""What a terminal of 80 columns shows: words are whole, in tables, in `--help` and in the list of targets."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from parablock.cli.doctor import Finding, as_table
from parablock.cli.main import app
from parablock.cli.word_table import WordTable

ROOT = Path(__file__).parents[3]
FIGURES = ("time, s", "in turn, s", "hidden", "MB up", "MB down", "MB of memory, foretold")
MEASURED = ("681.1", "1300.2", "41%", "390.8", "10390.8", "12605.9")


def shown(table: WordTable, width: int) -> list[str]:
    console = Console(width=width, no_color=True, force_terminal=True)
    with console.capture() as captured:
        console.print(table)
    return re.sub("\x1b\\[[0-9;]*m", "", captured.get()).splitlines()


def compared(*tasks: str) -> WordTable:
    table = WordTable("run", "final eval loss", *tasks, *FIGURES, narrow=True)
    table.add_row("base model", "1.3259", *("0.1" for _ in tasks), *("" for _ in FIGURES))
    table.add_row("parablock-delay1-seed0", "0.8511 ± 0.0123", *("0.1" for _ in tasks), *MEASURED)
    return table


def words(*texts: str) -> list[str]:
    return [word for text in texts for word in re.split(r"[^\w.%]+|(?<=_)", text) if word]


@pytest.mark.parametrize("tasks", [(), ("exact_match", "rouge_l")])
def test_a_comparison_fits_into_80_columns_with_every_word_whole(tasks: tuple[str, ...]) -> None:
    lines = shown(compared(*tasks), 80)
    assert max(map(len, lines)) <= 80
    whole = words(*lines)
    for word in words("parablock-delay1-seed0 0.8511", *FIGURES, *MEASURED, *tasks):
        assert word in whole, lines
    wide = shown(compared(*tasks), 160)
    assert len(wide) == 4 and "parablock-delay1-seed0" in wide[-1]
    assert max(map(len, shown(compared(*tasks), 40))) <= 40  # too narrow for its words, which are broken then


def test_a_table_of_findings_breaks_paths_at_their_slashes() -> None:
    folder = "/tmp/newcomer/parablock/of/somebody/who/has/long/names/for/folders"
    lines = shown(as_table([Finding("disk", f"24.2 GiB free in {folder}", "warning", "Free some space.")]), 80)
    assert max(map(len, lines)) <= 80
    assert set(words(folder)) <= set(words(*lines))
    assert not set(words(folder)) <= set(words(*shown(as_table([Finding("disk", folder)]), 24)))


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def help_words(path: tuple[str, ...], columns: int) -> set[str]:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    plain = re.sub("\x1b\\[[0-9;]*m|[─╭╰╮╯│]", " ", result.output)
    return set(plain.split())


def test_help_cuts_and_breaks_no_word_at_80_columns() -> None:
    broken = {path: help_words(path, 80) - help_words(path, 400) for path in commands(typer.main.get_command(app))}
    assert len(broken) > 30
    assert not {path: some for path, some in broken.items() if some}
    assert help_words(("export",), 24) - help_words(("export",), 400)  # what would be found


def test_the_targets_of_make_are_listed_in_80_columns() -> None:
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert sum(line.startswith("  make ") for line in listed) > 15
    assert [line for line in listed if len(line) > 80] == []
