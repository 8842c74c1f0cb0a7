"""Fields by which a row or a turn says whether it is learnt, and those that say it to other programs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parablock.data.sources import Row
from parablock.errors import DataError

SWITCHES = ("weight", "train", "loss")
"""Fields of a row or a turn: 1 or true, 0 or false."""

_OF_OTHER_PROGRAMS = {
    *("loss_mask", "loss_scale", "loss_weight", "mask", "masked", "sample_weight"),
    *("train_detail", "trainable", "training", "training_detail"),
}
_NO_OPS = {"masked": False, "trainable": True, "training": True}
"""Fields of other programs → the value with which they say what holds anyway."""
_IN_TABLES = {"0": 0, "0.0": 0, "false": False, "1": 1, "1.0": 1, "true": True}
"""Text of a cell → what it says."""


def is_nothing(value: Any) -> bool:
    """Return whether a value stands for none: null, or NaN, as pandas writes null among numbers."""
    return bool(value is None or value != value)


def _told(value: Any) -> Any:
    return _IN_TABLES.get(value.strip().lower(), value) if isinstance(value, str) else value


def check_names(row: Row, where: str, fields: Mapping[str, Any]) -> None:
    """Refuse a field that says to other programs what is learnt, since leaving it out would change what is learnt.

    Args:
        row: The row, for messages.
        where: What has the fields, in words.
        fields: Those of the row, of a turn or of a part of its content.

    Raises:
        DataError: There is one.
    """
    for name, value in fields.items():
        plain, told = name.lower(), _told(value)
        is_rejected = plain == "label" and told is False  # as KTO marks a bad answer
        is_no_op = plain in _NO_OPS and told == _NO_OPS[plain]
        says_nothing = is_nothing(value) or value == "" or is_no_op
        is_misspelt = plain in SWITCHES and name not in SWITCHES
        if not says_nothing and (plain in _OF_OTHER_PROGRAMS or is_misspelt or is_rejected):
            raise DataError(
                f"{row.place}: {where} has {name} {value!r}, with which other programs say what is learnt; "
                "ParaBlock does not read it, and would learn all.",
                cause="Rows and turns are learnt whole or not at all, as weight, train or loss say.",
                remedy=f"Write weight: 0 where nothing is to be learnt, and leave {name} out, or rename it where "
                "it means something else.",
            )


def is_switch(name: str) -> bool:
    """Return whether a field says what is learnt, here or in another program."""
    return name.lower() in {*SWITCHES, *_OF_OTHER_PROGRAMS, "label"}


def is_off(row: Row) -> str:
    """Return the field by which a row says that nothing of it is learnt, as `weight: 0`; empty if there is none.

    Raises:
        DataError: A field says neither yes nor no, or is read by other programs alone.
    """
    is_judged = row.fields.keys() >= {"prompt", "completion"}  # else a label is a class
    check_names(row, "the row", {k: value for k, value in row.fields.items() if is_judged or k.lower() != "label"})
    off = ""
    for name in SWITCHES:
        given = row.fields.get(name)
        if is_nothing(given) or given == "":
            continue
        value = _told(given)
        if value not in (0, 1):  # so is a boolean
            raise DataError(
                f"{row.place}: the row has {name} {given!r}; a row is learnt (1, true) or not (0, false).",
                cause="Rows have no shares; a row counts more often where it stands more often.",
                remedy=f"Give 0 or 1, or rename {name} where it means something else.",
            )
        if not value:
            off = off or f"{name}: {given}"
    return off
