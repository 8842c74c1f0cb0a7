"""What a resumed run says of its checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parablock.algorithm.parablock import initial_server
from parablock.experiment.recorder import where_it_goes_on
from parablock.storage.checkpoint import RunState


@pytest.mark.parametrize(
    ("begun", "done", "said"),
    [
        (
            3,
            2,
            "2 of 4 rounds are done, the updates of round 3 are under way; from round 4 on, what had been begun",
        ),
        (3, 1, "1 of 4 rounds is done, the updates of rounds 2 to 3 are under way; from round 4 on, what had"),
        (2, 2, "2 of 4 rounds are done; from round 3 on, what had been begun is computed again"),
        (4, 3, "3 of 4 rounds are done, the updates of round 4 are under way"),
    ],
)
def test_rounds_count_from_1_and_those_under_way_and_computed_again_are_told(begun: int, done: int, said: str):
    state = RunState(begun, replace(initial_server(()), committed=done - 1), (), {}, [])
    told = where_it_goes_on(state, 4)
    assert told.startswith(f"resuming from the checkpoint round-{begun:06d}: {said}")
    assert ("computed again" in told) == (begun < 4)
