"""Loss after every commit of a fixed toy run, for three delays: the method's numbers do not drift unseen.

Written by `python tests/golden/test_trajectories.py`; look at the difference before committing a new file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from parablock.algorithm.sequential import OracleProblem, run_sequential
from toy import initial, loss_of, solve

GOLDEN = Path(__file__).with_name("trajectories.json")
EXAMPLES = [3, 1, 2, 5]
CASES = {
    f"delay {delay}, {rule}, {schedule}": OracleProblem(EXAMPLES, 16, delay, in_flight=rule, schedule=schedule)
    for delay in (0, 1, 2)
    for rule in ("aligned", "own")
    for schedule in ("cyclic", "shuffled")
}


def losses(problem: OracleProblem) -> list[float]:
    return [loss_of(params, len(EXAMPLES)) for params in run_sequential(initial(4), problem, solve).trajectory]


@pytest.mark.parametrize("case", CASES)
def test_the_trajectory_is_the_golden_one(case):
    golden = json.loads(GOLDEN.read_text())
    assert losses(CASES[case]) == pytest.approx(golden[case], rel=1e-5)
    others = [
        name for name in CASES if name != case and not (case.startswith("delay 0") and name.startswith("delay 0"))
    ]
    for name in others:
        assert losses(CASES[case]) != pytest.approx(golden[name], rel=1e-5), f"it is also that of {name}"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case: losses(problem) for case, problem in CASES.items()}, indent=1) + "\n")
