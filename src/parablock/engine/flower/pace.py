"""How often something that Flower still carries is asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

FIRST_S = 0.25


def ask_often(module: Any, pull: str, most_s: float) -> None:
    """Let a function of Flower's ask soon again for what is not there yet, for as long as it would.

    Its own pause grows from 1 s to 10 s, and may begin right before the last byte comes.

    Args:
        module: Of Flower 1.41, where the function is used.
        pull: Its name there.
        most_s: What a pause grows to, from `FIRST_S`.
    """
    from flwr.supercore.constant import PULL_MAX_TIME

    tries = int(PULL_MAX_TIME / most_s)
    function = getattr(module, pull)
    setattr(
        module,
        pull,
        partial(function, initial_backoff=FIRST_S, backoff_cap=most_s, max_tries_per_object=tries),
    )
