"""FLoRA: what is added to the matrices is the exact mean of what the clients learned, and it costs bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines import QUIET
from parablock import load_config
from parablock.algorithm.aggregate import average
from parablock.algorithm.stacking import Factors, StackAggregation
from parablock.clock import VirtualClock
from parablock.engine.contract import EngineResult
from parablock.engine.faults import NO_FAULTS
from parablock.engine.inprocess import run_in_process
from parablock.errors import CodecError
from parablock.experiment.engines import engine_input
from parablock.experiment.inputs import read_inputs
from parablock.methods.base import MethodModel, RunInputs
from parablock.methods.choose import make_method_model
from parablock.methods.flora import factors_of
from parablock.model.adapters import adapted_layers, draw_adapters
from parablock.seeding import generator_for
from parablock.trace import Trace
from tiny_runs import NUM_CLIENTS, Workshop, metrics_of

EXAMPLES = {0: 1, 1: 5, 2: 2}


def job_of(workshop: Workshop, *overrides: str) -> RunInputs:
    return read_inputs(load_config(workshop.config, ["federation.method=flora", "federation.delay=0", *overrides]))


def run(job: RunInputs, fleet: MethodModel) -> EngineResult:
    given = engine_input(job.config, fleet, Trace(VirtualClock()), QUIET, faults=NO_FAULTS)
    return run_in_process(replace(given, take_params=lambda: fleet.params))


# -- the stack ------------------------------------------------------------------------------------------------


@pytest.fixture
def factors() -> Factors:
    """Adapters of two matrices, 5 × 3 and 4 × 6, of which the model keeps the second one the other way round."""
    return Factors(shapes=((5, 3), (4, 6)), transposed=(False, True), rank=2, scale=0.5)


def drawn(factors: Factors) -> dict[int, tuple[Tensor, int]]:
    return {
        i: (torch.from_numpy(generator_for(i, "flora").normal(size=factors.num_elements)).float(), examples)
        for i, examples in EXAMPLES.items()
    }


def product_by_hand(factors: Factors, flat: Tensor) -> Tensor:
    a_first, b_first, a_second, b_second = torch.split(flat.double(), [6, 10, 12, 8])
    first = b_first.view(5, 2) @ a_first.view(2, 3)
    second = b_second.view(4, 2) @ a_second.view(2, 6)
    return 0.5 * torch.cat([first.reshape(-1), second.T.reshape(-1)])


def test_the_product_of_the_stack_is_the_weighted_sum_of_the_products(factors: Factors):
    updates = drawn(factors)
    exact = torch.stack([n / 8 * product_by_hand(factors, own) for own, n in updates.values()]).sum(0)
    stacked = factors.product(factors.stack(updates))
    torch.testing.assert_close(stacked.double(), exact, rtol=1e-5, atol=1e-6)
    averaged = factors.product(average(updates).mean_delta)  # FedIT: the product of the means
    assert (averaged.double() - exact).norm() > 0.1 * exact.norm()


def test_an_aggregate_of_stacks_tells_the_alignment_of_the_products(factors: Factors):
    updates = drawn(factors)
    aggregation = StackAggregation(factors)
    aggregation.fold(updates)
    found = aggregation.aggregate()
    dense = average({i: (factors.product(own), n) for i, (own, n) in updates.items()})
    assert found.rho == pytest.approx(dense.rho, rel=1e-4)
    assert found.squared_delta == pytest.approx(dense.squared_delta, rel=1e-4)
    assert 0 < found.rho < 1
    alike = StackAggregation(factors)
    alike.fold(dict.fromkeys(updates, updates[0]))
    assert alike.aggregate().rho == pytest.approx(1.0)


def test_the_product_does_not_depend_on_where_in_memory_a_message_lies(factors: Factors):
    stack = factors.stack(drawn(factors))
    for offset in (1, 3):
        shifted = torch.cat([torch.zeros(offset), stack])[offset:]
        assert torch.equal(factors.product(shifted), factors.product(stack))
    assert not torch.equal(factors.product(stack.flip(0)), factors.product(stack))


def test_the_product_has_the_bits_that_one_rounding_after_the_other_gives_and_a_matrix_product_has_others():
    factors = Factors(shapes=((700, 500),), transposed=(False,), rank=16, scale=0.3)
    flat = torch.from_numpy(generator_for(0, "flora").normal(size=factors.num_elements)).float()
    ((a, b),) = factors.split(flat)
    by_hand = np.zeros((700, 500), dtype=np.float32)
    for rank in range(16):
        by_hand += b.numpy()[:, rank : rank + 1] * a.numpy()[rank]
    by_hand *= np.float32(0.3)
    assert np.array_equal(factors.product(flat).numpy(), by_hand.reshape(-1))
    assert not torch.equal(factors.product(flat), (0.3 * (b @ a)).reshape(-1)), "whose order is the machine's"


@pytest.mark.parametrize("size", [0, 35, 37])
def test_a_stack_of_no_whole_number_of_clients_is_refused(factors: Factors, size: int):
    assert factors.num_elements == 36
    with pytest.raises(CodecError, match="36"):
        factors.product(torch.zeros(size))


# -- runs -----------------------------------------------------------------------------------------------------


def test_a_round_adds_the_mean_of_what_the_clients_learned(workshop: Workshop):
    job = job_of(workshop, "federation.num_rounds=1")
    fleet = make_method_model(job)
    factors = factors_of(job.loaded.model, job.config)
    learned = {i: (t.train(0, 0, 2, 0, fleet.params).trained, t.num_examples) for i, t in enumerate(fleet.trainers)}
    (before,) = fleet.params
    (after,) = run(job, fleet).server.params
    total = sum(n for _, n in learned.values())
    exact = sum(n / total * factors.product(own).double() for own, n in learned.values())
    torch.testing.assert_close((after - before).double(), exact, rtol=0, atol=1e-6)
    assert exact.norm() > 100 * (1e-6 * exact.numel() ** 0.5)
    averaged = factors.product(average(learned).mean_delta).double()  # FedIT: the product of the means
    assert (averaged - exact).norm() > 0.1 * exact.norm()


def test_every_client_draws_its_own_adapters_anew_in_each_round(workshop: Workshop):
    job = job_of(workshop)
    factors = factors_of(job.loaded.model, job.config)

    def drawn_a(**place: int) -> Tensor:
        pairs = factors.split(
            draw_adapters(job.loaded.model, **{"seed": 0, "round_index": 0, "client_id": 0} | place)
        )
        assert all(not b.any() for _, b in pairs)
        return torch.cat([a.reshape(-1) for a, _ in pairs])

    first = drawn_a()
    assert torch.equal(first, drawn_a())
    for other in (drawn_a(seed=1), drawn_a(round_index=1), drawn_a(client_id=1)):
        assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "setting",
    [
        *("seed=0", "federation.participation=0.5", "model.dtype=bfloat16"),
        *("wire.format=bfloat16", "wire.format=int8", "wire={format: int4, rounding: nearest}"),
    ],
)
def test_all_clients_end_with_the_bits_of_the_server(workshop: Workshop, setting: str):
    job = job_of(workshop, setting)
    fleet = make_method_model(job)
    result = run(job, fleet)
    assert len(result.clients) == NUM_CLIENTS
    for client in result.clients:
        assert torch.equal(client.base[0], result.server.params[0])
    assert not torch.equal(result.server.params[0], fleet.params[0])


def test_the_way_down_grows_with_the_clients_and_the_way_up_does_not(workshop: Workshop, tmp_path: Path):
    per_client: dict[int, Any] = {}
    for clients in (2, 4):
        files = ", ".join(str(workshop.client_file(i)) for i in range(clients))
        settings = (f"data.train=[{files}]", f"federation.num_clients={clients}", "federation.num_rounds=3")
        outcome = workshop.run(tmp_path / str(clients), "federation.method=flora", "federation.delay=0", *settings)
        assert outcome.code == 0, outcome.stderr
        row = metrics_of(tmp_path / str(clients))[1]
        per_client[clients] = (row["uplink_bytes"] / clients, row["downlink_bytes"] / clients)
    elements = factors_of(job_of(workshop).loaded.model, job_of(workshop).config).num_elements
    for clients, (up, down) in per_client.items():
        assert 0 < up - 4 * elements < 600
        assert 0 < down - 4 * elements * clients < 600


@pytest.mark.parametrize(("name", "part"), [("bfloat16", 0.5), ("int8", 0.2578), ("int4", 0.1328)])
def test_adapters_and_stacks_travel_in_the_format_of_the_wire(
    workshop: Workshop, tmp_path: Path, name: str, part: float
):
    rows = {}
    for way in ("float32", name):
        settings = (
            "federation.method=flora",
            "federation.delay=0",
            "federation.num_rounds=3",
            f"wire.format={way}",
        )
        assert workshop.run(tmp_path / way, *settings).code == 0
        rows[way] = metrics_of(tmp_path / way)[1] | {"eval_loss": metrics_of(tmp_path / way)[-1]["eval_loss"]}
    for way in ("uplink_bytes", "downlink_bytes"):
        assert rows[name][way] / rows["float32"][way] == pytest.approx(part, rel=0.06)
    assert rows[name]["eval_loss"] != rows["float32"]["eval_loss"]
    assert rows[name]["eval_loss"] == pytest.approx(rows["float32"]["eval_loss"], rel=0.05)


def test_outside_training_the_adapters_add_nothing(workshop: Workshop):
    job = job_of(workshop)
    fleet = make_method_model(job)
    before = fleet.evaluate(fleet.params)
    fleet.trainers[0].train(0, 0, 2, 0, fleet.params)
    assert any(layer.lora_B["default"].weight.any() for _, layer in adapted_layers(job.loaded.model))
    assert fleet.evaluate(fleet.params) == before
    assert fleet.evaluate((fleet.params[0] * 1.1,)) != before
