"""Text of others, such as rows, answers and names of files, made harmless for a terminal, a page and a log."""

from __future__ import annotations

import re
import shlex
from html import escape

_ACTS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
"""C0 without tab and line feed, DEL, C1, and what turns the direction of writing (Boucher and Anderson, 2021)."""

_ACTING = re.compile(rf"(?!\r\n)[{_ACTS}]")
_OF_DISPLAYS = re.compile(rf"\x1b\[\??[0-9;]*[A-DGHJKhlm]|\r|([{_ACTS}])")

_IN_A_LINE = {"\t": "\\t", "\n": "\\n", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""What parts lines or cells, and `printable` lets be."""
_ENDING = re.compile(f"[{''.join(_IN_A_LINE)}]")

_MARKS = re.compile(r"[\\<\[`|]")


def as_argument(path: object) -> str:
    r"""Return a path as a shell takes it for a word of a command, and the command for a path.

    Of a line end and of what would act on a terminal it is the escape, in a form that bash and zsh read: `$'a\nb'`.
    """
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if in_one_line(text) == text:
        return shlex.quote(text)
    escaped = in_one_line(re.sub(r"[\\']", r"\\\g<0>", text))
    return f"$'{escaped}'"


def counted(count: int, noun: str) -> str:
    """Return a number and what is counted, such as `1 row` and `2,000 rows`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def printable(text: str) -> str:
    r"""Return a text with its control characters as escapes, such as `\u001b`; tabs and line ends stay.

    So do the line ends of Windows. The escapes are those of JSON, so that a line of JSON keeps its value.
    """
    return _ACTING.sub(lambda found: _escaped(found[0]), text)


def in_one_line(text: str) -> str:
    r"""Return a text as `printable` does, but without tabs and line ends: they become `\t` and `\n`."""
    return printable(_ENDING.sub(lambda found: _IN_A_LINE[found[0]], text))


def displayable(text: str) -> str:
    """Return a text as `printable` does, but with colours and motions of the cursor, of which displays consist."""
    return _OF_DISPLAYS.sub(lambda found: _escaped(found[0]) if found[1] else found[0], text)


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"


def as_html(text: str) -> str:
    """Return a text for a page, in which nothing of it is markup."""
    return escape(printable(text))


def as_markdown(text: str) -> str:
    """Return a text for one line of Markdown, in which nothing of it is HTML, a link, a picture or code."""
    return _MARKS.sub(r"\\\g<0>", printable(" ".join(text.split())))
