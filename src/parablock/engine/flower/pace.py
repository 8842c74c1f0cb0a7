"""How functions of Flower 1.41 go about what they carry: they ask for it soon again, and hold little of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

ONE_BY_ONE = {"FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1", "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "1"}
"""Lets a ClientApp, and the server's run for each site, move one object at a time from or to Flower's process that
is beside it: several would want the same cores, and memory each."""

FIRST_S = 0.25

READ_ELEMENTS = 4
"""How many objects are made ready to be pushed; every other one is of an Array's bytes, the rest are short."""


def ask_often(module: Any, pull: str, most_s: float) -> None:
    """Let a function of a module of Flower 1.41 ask soon again for what is not there yet, as long as it would.

    Its pauses grow from `FIRST_S` to `most_s`. Its own are longer, and may begin right before the last byte comes.
    """
    from flwr.supercore.constant import PULL_MAX_TIME

    tries = int(PULL_MAX_TIME / most_s)
    function = getattr(module, pull)
    often = partial(function, initial_backoff=FIRST_S, backoff_cap=most_s, max_tries_per_object=tries)
    setattr(module, pull, often)


def push_a_few_at_a_time(module: Any) -> None:
    """Let a module of Flower 1.41 copy a few objects, push them, and go on with the next.

    By itself it copies all that a message carries before the first is through.
    """
    push_objects = module.push_objects

    def push(
        objects: dict[str, Any],
        push_object_fn: Callable[[str, bytes], None],
        *,
        object_ids_to_push: set[str] | None = None,
    ) -> None:
        wanted = [i for i in objects if object_ids_to_push is None or i in object_ids_to_push]
        for first in range(0, len(wanted), READ_ELEMENTS):
            few = {object_id: objects.pop(object_id) for object_id in wanted[first : first + READ_ELEMENTS]}
            push_objects(few, push_object_fn)

    module.push_objects = push
