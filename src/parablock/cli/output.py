"""Standard output and standard error that outlast their reader, their disk and their terminal.

A run must not end because nobody can read what it says. Characters that a terminal cannot show become similar ones,
and those that would act on it become escapes: what a command says goes through a `SafeConsole` or `say`, which let
none through, and what libraries write goes through the streams, which let colours through.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from parablock.printable import displayable, in_one_line, printable

SIMILAR = {
    "→": "->",
    "–": "-",
    "—": "-",
    "…": "...",
    "·": ".",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "~": "~",
    "±": "+-",
    "█": "#",
    "▲": "^",
    "▼": "v",
    "│": "|",
    "─": "-",
    "ρ": "rho",
    "Δ": "delta",
    "δ": "delta",
    "ε": "epsilon",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
_REPLACE = "parablock.similar"
_PROGRAMS = "parablock|pip|jq|flwr|iconv|zcat|bzcat|zstdcat|git -C|sudo|chmod|hf"
_WORD = re.compile(rf"[`'\"(\[]?\b(?:{_PROGRAMS}) [A-Za-z0-9-].*|\S+")
"""A command to the end of its line, or a word."""


class SafeConsole(Console):
    """A console on which no text acts, whosever it is: it colours and moves by what rich itself adds to a text.

    On a terminal, text is broken between words, and no word and no command is, so that both can be copied;
    elsewhere its lines stay whole.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)  # a path may hold brackets and colons

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, with text wrapped as the class says."""
        if all(isinstance(one, str | Text) for one in objects):
            if self.is_terminal:
                objects = tuple(self._wrapped(one, options.get("highlight")) for one in objects)
            options["soft_wrap"] = True
        super().print(*objects, **options)

    def print_as_it_is(self, text: str | Text) -> None:
        """Print what a model or a row says: its lines are its own."""
        if self.is_terminal:
            super().print(text, soft_wrap=True, highlight=False)
        else:  # rich would make spaces of tabs
            self.file.write(f"{printable(str(text))}\n")

    def _wrapped(self, text: str | Text, highlight: bool | None) -> Text:
        """Break the lines of a text before words that do not fit; rich would break a long word."""
        text = self.render_str(text, highlight=highlight) if isinstance(text, str) else text
        offsets, begin = list[int](), 0
        for word in _WORD.finditer(text.plain):
            begin = max(begin, text.plain.rfind("\n", 0, word.start()) + 1)
            has_words = text.plain[begin : word.start()].strip()
            if has_words and cell_len(text.plain[begin : word.end()]) > self.width:
                begin = word.start()
                offsets.append(begin)
        lines = text.divide(offsets)
        for line in lines[:-1]:
            line.rstrip()
        return Text("\n").join(lines)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make the text of a string, with escapes for what rich would leave out."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of anything, with escapes in their text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def say(*lines: str, err: bool = False) -> None:
    """Print lines for people on standard output or standard error, as a `SafeConsole` does; each stays one line."""
    SafeConsole(stderr=err).print("\n".join(map(in_one_line, lines)), highlight=False)


def say_whole(text: str) -> None:
    """Print lines that are for programs or to be copied, such as JSON: their control characters become escapes."""
    sys.stdout.write(f"{printable(text)}\n")


class LastingStream:
    """A text stream whose writes do not fail; after the first failure they are dropped. Text in it may be coloured.

    What the handler of a signal writes while a write is under way comes after it: Python's own streams refuse that.

    Attributes:
        failure: The error of the first write that failed; None if there was none.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: list[str] = []
        self._is_busy = False
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write text; return its length."""
        self._waiting.append(displayable(text))
        self._work(flushes=False)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._work(flushes=True)

    def _work(self, *, flushes: bool) -> None:
        if self._is_busy:
            return
        self._is_busy = True
        try:
            if flushes:
                self._stream.flush()
            while self._waiting:
                self._stream.write(self._waiting.pop(0))
                if flushes:
                    self._stream.flush()
        except OSError as error:
            self._drop(error)
        finally:
            self._is_busy = False

    def _drop(self, error: OSError) -> None:
        """Lead the file descriptor nowhere, so that what is in the buffer causes no error either."""
        self.failure = self.failure or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_closed_pipe(failure: OSError | None) -> bool:
    """Return whether the reader has gone, which is its right: `parablock plan … | head`."""
    return failure is not None and failure.errno == errno.EPIPE


@contextmanager
def lasting_output() -> Iterator[LastingStream]:
    """Replace `sys.stdout` and `sys.stderr` in the block by streams that do not fail; yield standard output."""
    codecs.register_error(_REPLACE, _similar)
    kept = sys.stdout, sys.stderr
    for stream in kept:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_REPLACE)
    output = LastingStream(sys.stdout)
    sys.stdout, sys.stderr = output, LastingStream(sys.stderr)
    try:
        yield output
    finally:
        output.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = kept


def _similar(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(SIMILAR.get(character, "?") for character in wrong), error.end
