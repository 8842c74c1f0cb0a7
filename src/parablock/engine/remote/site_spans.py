"""The record that a site sends of its computation, read strictly."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from parablock.trace import Span

SPANS_KEPT = 10_000
"""How much of a site's record is kept between two rounds of it."""
CLOCKS_APART_S = 60.0
"""How far a site's spans may lie outside of the run."""
_Seconds = Annotated[float, Field(allow_inf_nan=False)]
_Row = tuple[
    Literal["computing", "waiting"],
    _Seconds,
    Annotated[_Seconds, Field(ge=0)],
    dict[Literal["round_index", "block_index"], Annotated[int, Field(ge=0, lt=1 << 31)]],
]
_ROWS: TypeAdapter[list[_Row]] = TypeAdapter(Annotated[list[_Row], Field(max_length=SPANS_KEPT)])


def spans_of(client_id: int, note: bytes, origin_s: float, now_s: float) -> list[Span]:
    """Return a client's spans by the run's clock, which began at `origin_s`, seconds since 1970.

    Raises:
        ValueError: They cannot be read, or lie outside of the run.
    """
    try:
        rows = _ROWS.validate_python([tuple(row) for row in json.loads(note)])
    except (ValidationError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    spans = [
        Span(
            client_id,
            "compute",
            activity,
            start_s - origin_s,
            duration_s,
            {str(name): value for name, value in facts.items()},
        )
        for activity, start_s, duration_s, facts in rows
    ]
    if not all(
        -CLOCKS_APART_S <= span.start_s <= span.start_s + span.duration_s <= now_s + CLOCKS_APART_S
        for span in spans
    ):
        raise ValueError("spans outside of the run")
    return spans
