"""Steps that a plan takes to know what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from parablock.config.load import load_config
from parablock.errors import ConfigError, DataError
from parablock.plan.forecast import make_plan
from parablock.plan.probe import probed_compute
from parablock.plan.scenario import Scenario
from tiny_runs import Workshop, sum_row, write_rows


def test_a_probe_takes_real_steps_and_knows_every_clients_batches(workshop: Workshop, tmp_path: Path) -> None:
    long_rows = [sum_row(k, k) | {"prompt": f"{k} plus {k}? " * 6} for k in range(8)]
    files = [str(write_rows(tmp_path / "long.jsonl", long_rows)), str(workshop.client_file(0))]
    config = load_config(
        workshop.config,
        [
            *("engine.step_time_s=null", f"data.train={json.dumps(files)}"),
            *("federation.num_clients=2", "federation.num_rounds=2", "data.max_length=256"),
        ],
    )
    plan = make_plan(config, probe=True)  # two rounds do not reach all blocks, which is no error here
    assert plan.compute_source == "probed" and plan.compute_s > 0
    assert len(plan.never_visited) == 2 and "GFLOP/s on the cpu of this machine" in plan.assumptions[0]
    assert " visits of 4 blocks with" in plan.assumptions[0]
    whole = load_config(
        workshop.config, ["engine.step_time_s=null", "federation.method=fedavg", "federation.delay=0"]
    )
    assert " visits of 1 block with" in probed_compute(whole).assumption
    compute, block = probed_compute(config), Scenario(config, probe=False).blocks[0]
    assert compute.round_s(block, 0, 0, 4) > compute.round_s(block, 0, 0, 2) > 0
    # client 0 has examples five times as long; what the machine deviates is less
    assert fmean(compute.round_s(block, t, 0, 2) for t in range(9)) > 1.5 * fmean(
        compute.round_s(block, t, 1, 2) for t in range(9)
    )


def test_a_probe_beside_a_stated_step_and_a_probe_without_data_are_errors(workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match=r"engine\.step_time_s.*leave one of them out"):
        make_plan(load_config(workshop.config), probe=True)
    missing = ["engine.step_time_s=null", "data.train=[a.jsonl,b.jsonl,c.jsonl,d.jsonl]"]
    make_plan(load_config(workshop.config, missing))  # without a probe no data is read
    with pytest.raises(DataError, match=r"a\.jsonl"):
        make_plan(load_config(workshop.config, missing), probe=True)
