"""Tables on a terminal, which break their cells between words and never within one, as long as that fits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from parablock.printable import in_one_line

_PIECE = re.compile(r"\S+?(?<=\w)[-_/](?=[A-Za-z])|\S+")
"""What stays in one line: a word, or a part of one that a hyphen, an underscore or a slash joins to another."""


class WordTable:
    """A table whose columns are as wide as their longest word, and wider where there is room.

    Where not even the words fit, the longest of them are broken.

    Args:
        headings: The headings of the columns.
        num_words: How many of the first columns hold words; with `narrow` the others are figures, to the right.
        narrow: Whether to leave out frames, for many columns.
        caption: A line below the table.
    """

    def __init__(self, *headings: str, num_words: int = 1, narrow: bool = False) -> None:
        self._headings, self._num_words, self._narrow = headings, num_words, narrow
        self._rows: list[tuple[str | Text, ...]] = []
        self.caption: str | None = None

    def add_row(self, *cells: str | Text) -> None:
        """Append a row; texts of others stay in one line."""
        self._rows.append(tuple(in_one_line(cell) if isinstance(cell, str) else cell for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the table, fitted into the width of the console."""
        frames = len(self._headings) - 1 if self._narrow else 3 * len(self._headings) + 1
        widths = self._widths(options.max_width - frames)
        table = Table(caption=self.caption)
        if self._narrow:
            table = Table(box=box.SIMPLE, padding=(0, 0), show_edge=False, caption=self.caption)
        for n, (heading, width) in enumerate(zip(self._headings, widths, strict=True)):
            justify: Literal["left", "right"] = "right" if self._narrow and n >= self._num_words else "left"
            table.add_column(_broken(heading, width), width=width, overflow="fold", justify=justify)
        for row in self._rows:
            cells = (
                cell if isinstance(cell, Text) else _broken(cell, width)
                for cell, width in zip(row, widths, strict=True)
            )
            table.add_row(*cells)
        yield table

    def _widths(self, room: int) -> list[int]:
        """Give each column its longest word, then whole cells and whole headings to those that need the least."""
        columns = [[heading, *(str(row[n]) for row in self._rows)] for n, heading in enumerate(self._headings)]
        widths = [max(map(_longest_piece, column)) for column in columns]
        while sum(widths) > room and max(widths) > 1:
            widths[widths.index(max(widths))] -= 1
        for wholes in ([column[1:] for column in columns], columns):
            needs = [
                max(map(cell_len, whole), default=0) - width for whole, width in zip(wholes, widths, strict=True)
            ]
            for n in sorted(range(len(widths)), key=needs.__getitem__):
                widths[n] += max(0, min(needs[n], room - sum(widths)))
        return widths


def _longest_piece(text: str) -> int:
    return max(map(cell_len, _PIECE.findall(text)), default=0)


def _broken(text: str, width: int) -> str:
    """Break a text where its pieces end, into lines of at most a width."""
    return "\n".join(line for whole in text.split("\n") for line in _lines(whole, width))


def _lines(text: str, width: int) -> Sequence[str]:
    lines, end = [""], 0
    for piece in _PIECE.finditer(text):
        joined = f"{lines[-1]}{text[end : piece.start()]}{piece[0]}"
        end = piece.end()
        if cell_len(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(piece[0])
    return lines
