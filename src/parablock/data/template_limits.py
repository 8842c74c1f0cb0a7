"""Limits of chat templates: they come with a model, and are programs.

Transformers runs them in Jinja's sandbox, which keeps them from files and code, but not from time and memory. Here
a template may be of some length, may not multiply (`*`, `**`), and has some steps, seconds and memory for a
conversation. A step is a line of the compiled template, or a call. Transformers compiles a template when it is
first rendered, within the same limits.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import Any

import psutil
from jinja2 import Environment, TemplateError

from parablock.errors import ModelError

MAX_CHARACTERS = 1 << 20
MAX_STEPS = 2_000_000
MAX_S = 30.0
MAX_BYTES = 1 << 30
TEMPLATE_FILE = "<template>"
"""What Jinja calls the file of a template that was given as text."""
_REMEDY = "Use the chat template that the model's makers publish, or remove it from tokenizer_config.json."


class _TooMuch(Exception):  # noqa: N818  (it becomes a ModelError)
    """A template is beyond a limit."""


def check_template(source: str) -> None:
    """Check a template before it is compiled, since Jinja computes its constants then.

    Raises:
        ModelError: It is too long, or multiplies.
    """
    if len(source) > MAX_CHARACTERS:
        raise _refused(f"has {len(source):,} characters, and may have {MAX_CHARACTERS:,}")
    try:
        operators = {value for _, kind, value in Environment().lex(source) if kind == "operator"}
    except TemplateError:
        return  # whoever compiles it says so
    if found := sorted(operators & {"*", "**"}):
        raise _refused(f"multiplies ({', '.join(found)}), with which a short line takes all memory or time")


@contextmanager
def bounded_rendering(place: str) -> Iterator[None]:
    """Keep a rendering within the limits; `place` is that of the row, for the error.

    Raises:
        ModelError: It is beyond one of them.
    """
    steps, until_s = 0, time.perf_counter() + MAX_S

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        del event, argument
        steps += 1
        if steps > MAX_STEPS:
            raise _TooMuch(f"takes more than {MAX_STEPS:,} steps")
        if time.perf_counter() > until_s:
            raise _TooMuch(f"takes longer than {MAX_S:g} s")
        return count if frame.f_code.co_filename == TEMPLATE_FILE else None

    before = sys.gettrace()
    try:
        with _bounded_memory():
            sys.settrace(count)
            try:
                yield
            finally:
                sys.settrace(before)
    except _TooMuch as error:
        raise _refused(f"{error} for the conversation of {place}") from None
    except MemoryError:
        raise _refused(f"takes more than {MAX_BYTES >> 20} MiB for the conversation of {place}") from None


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let this process grow by `MAX_BYTES` at most, where the system can do that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _process(os.getpid()).memory_info().vms + MAX_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@cache
def _process(pid: int) -> psutil.Process:
    """Return a process, which takes longer to find than to ask for its memory."""
    return psutil.Process(pid)


def _refused(what: str) -> ModelError:
    return ModelError(f"The chat template of the tokenizer {what}.", remedy=_REMEDY)
