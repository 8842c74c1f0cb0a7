"""Whom a round asks."""

from __future__ import annotations

import pytest

from engines import server_plan
from parablock.engine.participation import Participation
from parablock.engine.update_form import Differences
from parablock.wire.quantize import Encoding


@pytest.mark.parametrize(("is_masked", "asked"), [(True, (0,)), (False, (0, 2))])
def test_nobody_stands_in_where_masks_are_made_for_those_who_are_drawn(is_masked: bool, asked: tuple[int, ...]):
    plan = server_plan(3, 4, 0, Differences(Encoding("float32")), min_updates=2)
    participation = Participation(plan, {}, is_masked=is_masked)
    participation.leaves(1)
    assert participation.candidates((0, 1)) == asked
