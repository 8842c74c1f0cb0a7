"""Overlap is a schedule, not mathematics: both threads of every client, any clock, any link, same bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engines import run_here, server_plan
from parablock.algorithm.aggregate import Kinds, ServerOptimizer
from parablock.algorithm.parablock import same
from parablock.algorithm.robust import Normals, Rule, aggregate_by
from parablock.algorithm.sequential import OracleProblem, OracleResult, run_sequential
from parablock.algorithm.sparse_mean import average_sparse
from parablock.clock import RealClock, VirtualClock
from parablock.engine.contract import EngineResult
from parablock.engine.plans import Hooks
from parablock.engine.update_form import Differences, SparseDifferences
from parablock.privacy.protection import Protection
from parablock.seeding import generator_for
from parablock.trace import Trace
from parablock.wire.quantize import Encoding, downlink_format, pack, sparse_format
from parablock.wire.transport import Link
from toy import ToyTrainer, initial, solve

EXAMPLES = [3, 1, 2, 5]
ROUNDS = 14


def threaded(
    delay: int,
    *,
    clock=None,
    link: Link = Link(),  # noqa: B008
    participation: float = 1.0,
    schedule: str = "shuffled",
    encoding: Encoding = Encoding("float32"),  # noqa: B008
    dtype: torch.dtype = torch.float32,
    in_flight: str = "aligned",
    optimizer: ServerOptimizer = ServerOptimizer(),  # noqa: B008
    rule: Rule = Rule(),  # noqa: B008
    in_turn: bool = False,
    normals: Callable[[int, tuple[int, ...]], Normals] | None = None,
    protection: Protection | None = None,
    step_s: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
    num_groups: int = 4,
    kinds: Kinds | None = None,
) -> tuple[EngineResult, list[tuple[torch.Tensor, ...]], float]:
    clock = clock or VirtualClock()
    trajectory: list[tuple[torch.Tensor, ...]] = []
    is_sparse = sparse_format(encoding.format) is not None
    form = SparseDifferences(encoding) if is_sparse else Differences(encoding, rule, normals, kinds)
    changes = {"schedule": schedule, "participation": participation, "server_optimizer": optimizer}
    plan = server_plan(len(EXAMPLES), ROUNDS, delay, form, in_turn=in_turn, **changes)
    result = run_here(
        initial(num_groups, dtype),
        [ToyTrainer(i, n, step_s[i]) for i, n in enumerate(EXAMPLES)],
        plan,
        Trace(clock),
        Hooks(lambda state, updates, traffic: trajectory.append(state.params), lambda state: None),
        link=link,
        in_flight=in_flight,
        protection_of=lambda client_id: protection,
    )
    return result, trajectory, clock.now()


def oracle(delay: int, *, dtype: torch.dtype = torch.float32, num_groups: int = 4, **changes) -> OracleResult:
    fresh = changes.pop("fresh", dict)
    problem = OracleProblem(EXAMPLES, ROUNDS, delay, **{"schedule": "shuffled", **changes, **fresh()})
    return run_sequential(initial(num_groups, dtype), problem, solve)


def assert_equal(found, expected: OracleResult) -> None:
    result, trajectory, _ = found
    assert len(trajectory) == len(expected.trajectory) == ROUNDS
    assert all(same(a, b) for a, b in zip(trajectory, expected.trajectory, strict=True))
    assert same(result.server.view, expected.server.view)
    for client in result.clients:
        assert same(client.base, expected.server.view)
        assert client.in_flight == ()


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize(
    "link", [Link(), Link(0.001, 0.001), Link(0.0005, 0.5, 0.3)], ids=["unlimited", "slow", "lopsided"]
)
def test_virtual_threads_equal_the_oracle_at_any_link_speed(delay, link):
    found = threaded(delay, link=link, step_s=(1.0, 0.1, 4.0, 2.0))
    assert_equal(found, oracle(delay))
    assert not same(found[0].server.params, oracle(delay + 1).server.params), "the delay matters with four clients"


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_real_threads_equal_the_oracle_and_leave_no_thread(delay, threads_left):
    found = threaded(delay, clock=RealClock(), link=Link(1.0, 1.0, 0.001))
    assert_equal(found, oracle(delay))
    assert not threads_left()


def lossy(encoding: Encoding) -> dict[str, object]:
    """The same encoding, for the oracle: up with (round, client) draws, down as a difference from the view."""

    def fresh() -> dict[str, object]:
        residuals: dict[tuple[int, int], torch.Tensor] = {}

        def encode(delta: torch.Tensor, b: int, t: int, i: int) -> torch.Tensor:
            wanted = delta + residuals.get((i, b), 0.0) if encoding.error_feedback else delta
            sent = pack(wanted, encoding.format, encoding.noise(t, i)).values.float()
            residuals[i, b] = encoding.residual_decay * (wanted - sent)
            return sent

        def announce(new: torch.Tensor, view: torch.Tensor, t: int) -> torch.Tensor:
            return view + pack(new - view, downlink_format(encoding.format), encoding.noise(t, -1)).values.float()

        return {"encode": encode, "announce": announce}

    return {"fresh": fresh}


def sparse(encoding: Encoding) -> tuple[dict[str, object], dict[str, object]]:
    """Of 5 elements one goes up (683 of 4,096) and 3 come down; the oracle's mean is of sparse tensors, too."""

    def aggregate(updates, t):
        return average_sparse({i: (delta.to_sparse().coalesce(), n) for i, (delta, n) in updates.items()})

    return {"encoding": encoding}, {**lossy(encoding), "aggregate": aggregate}


def ruled(rule: Rule) -> tuple[dict[str, object], dict[str, object]]:
    return {"rule": rule}, {"aggregate": lambda updates, t: aggregate_by(rule, updates)}


def drawn(*key: int) -> Normals:
    generator = generator_for(0, "test noise", *key)
    return lambda size: torch.from_numpy(generator.standard_normal(size, dtype=np.float32))


def central() -> tuple[dict[str, object], dict[str, object]]:
    rule, protection = Rule(clip_norm=0.1, noise_multiplier=0.5), Protection(0.1)
    engine = {"rule": rule, "protection": protection, "normals": lambda t, clients, _: drawn(t, *clients)}
    return engine, {
        "encode": lambda delta, b, t, i: protection.apply(delta, t)[0],
        "aggregate": lambda updates, t: aggregate_by(rule, updates, lambda clients, _: drawn(t, *clients)),
    }


def local() -> tuple[dict[str, object], dict[str, object]]:
    protection = Protection(0.1, 0.5, lambda t, _: drawn(t))
    return {"protection": protection}, {"encode": lambda delta, b, t, i: protection.apply(delta, t)[0]}


VARIANTS = {
    "in turn": ({"in_turn": True}, {"in_turn": True}),
    "noise of the server": central(),
    "noise of the clients": local(),
    "median": ruled(Rule("median")),
    "trimmed mean": ruled(Rule("trimmed_mean", trim_fraction=0.3)),
    "krum": ruled(Rule("krum", assumed_attackers=0)),
    "clipped by the server": ruled(Rule(clip_norm=0.05)),
    "participation": ({"participation": 0.5}, {"participation": 0.5}),
    "cyclic": ({"schedule": "cyclic"}, {"schedule": "cyclic"}),
    "random": ({"schedule": "random"}, {"schedule": "random"}),
    "importance": ({"schedule": "importance"}, {"schedule": "importance"}),
    "own": ({"in_flight": "own", "schedule": "cyclic"}, {"in_flight": "own", "schedule": "cyclic"}),
    "mean": ({"in_flight": "mean"}, {"in_flight": "mean"}),
    "share": ({"in_flight": "share"}, {"in_flight": "share"}),
    "none": ({"in_flight": "none"}, {"in_flight": "none"}),
    "momentum": (
        {"optimizer": ServerOptimizer("momentum", 0.5)},
        {"server_optimizer": ServerOptimizer("momentum", 0.5)},
    ),
    "bfloat16 model": ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
    "bfloat16 wire": ({"encoding": Encoding("bfloat16")}, lossy(Encoding("bfloat16"))),
    "bfloat16 wire, participation": (
        {"encoding": Encoding("bfloat16"), "participation": 0.5},
        {"participation": 0.5, **lossy(Encoding("bfloat16"))},
    ),
    "int4 stochastic": ({"encoding": Encoding("int4", "stochastic")}, lossy(Encoding("int4", "stochastic"))),
    "int8 nearest": ({"encoding": Encoding("int8", "nearest")}, lossy(Encoding("int8", "nearest"))),
    "int2 with error feedback": (
        {"encoding": Encoding("int2", "nearest", error_feedback=True)},
        lossy(Encoding("int2", "nearest", error_feedback=True)),
    ),
    "sparse2": sparse(Encoding("sparse2-683", error_feedback=True)),
    "sparse2, residuals decay": sparse(Encoding("sparse2-683", error_feedback=True, residual_decay=0.95)),
}


WEIGHTS = ("own", "mean", "share", "none")
EVERY_ROUND = (
    *("cyclic", *WEIGHTS, "participation", "bfloat16 model", "bfloat16 wire, participation", "int4 stochastic"),
    *(
        "int8 nearest",
        "int2 with error feedback",
        "noise of the server",
        "noise of the clients",
        "median",
        "sparse2",
    ),
)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_every_option_of_the_method_is_the_same_in_threads(name, delay):
    engine, problem = VARIANTS[name]
    found = threaded(delay, link=Link(0.01, 0.01), **engine)
    assert_equal(found, oracle(delay, **problem))
    # Without anything in flight all weights are one; with three of four blocks in flight `random` has no choice.
    if (name, delay) not in (("mean", 0), ("share", 0), ("none", 0), ("random", 3)):
        control = oracle(delay).trajectory
        assert not all(same(a, b) for a, b in zip(found[1], control, strict=True)), f"{name} changed nothing"


@pytest.mark.parametrize("num_groups", [1, 2], ids=["all in every round", "two in turn"])
@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("name", EVERY_ROUND)
def test_a_group_that_comes_back_while_it_is_in_flight_is_the_same_in_threads(name, delay, num_groups):
    # All parameters or all adapters are one group, in flight in every round; RoLoRA has two in turn.
    engine, problem = VARIANTS[name]
    groups = {"schedule": "cyclic", "num_groups": num_groups}
    found = threaded(delay, link=Link(0.01, 0.01), step_s=(1.0, 0.1, 4.0, 2.0), **{**engine, **groups})
    assert_equal(found, oracle(delay, **{**problem, **groups}))
    if name not in (*WEIGHTS, "cyclic") or (delay and name != "cyclic"):
        control = oracle(delay, **groups).trajectory
        assert not all(same(a, b) for a, b in zip(found[1], control, strict=True)), f"{name} changed nothing"


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("rule", [Rule(), Rule("median")], ids=lambda rule: rule.name)
def test_a_group_whose_kinds_agree_differently_is_the_same_in_threads(rule, delay):
    kinds = Kinds((2, 1, 1, 1), 2)
    both = {"schedule": "cyclic", "num_groups": 1}

    def aggregate(updates, t):
        return aggregate_by(rule, updates, kinds=kinds)

    found, expected = (
        threaded(delay, rule=rule, kinds=kinds, **both),
        oracle(delay, kinds=kinds, aggregate=aggregate, **both),
    )
    assert_equal(found, expected)
    assert found[0].server.rho == expected.server.rho
    ((of_one, of_other),) = found[0].server.rho
    assert of_one != of_other
    control = oracle(delay, aggregate=lambda updates, t: aggregate_by(rule, updates), **both)
    assert same(found[0].server.params, control.server.params) == (delay == 0), "each kind has its weight in flight"


@pytest.mark.parametrize("delay", [1, 2])
def test_a_group_in_flight_on_a_real_clock_equals_the_oracle(delay):
    groups = {"schedule": "cyclic", "num_groups": 1}
    assert_equal(threaded(delay, clock=RealClock(), link=Link(1.0, 1.0, 0.001), **groups), oracle(delay, **groups))
    ends = [oracle(d, in_flight=rule, **groups).server.params for d, rule in ((0, "own"), (delay, "aligned"))]
    assert not same(*ends), "what is in flight changes the trajectory"


def test_delay_1_takes_the_longer_of_compute_and_communication_and_delay_0_their_sum():
    # A message is about 240 bytes: 0.00192 Mbit/s carries it in about 1 s; compute takes 2 s.
    link = Link(0.00192, 0.00192)
    sequential, overlapped = (
        threaded(0, link=link, step_s=(2.0,) * 4)[2],
        threaded(1, link=link, step_s=(2.0,) * 4)[2],
    )
    # 14 · (2 + 1 + 1) + 1 ≈ 57 against 14 · 2 + 2 ≈ 31 (comm 2 ≈ compute 2); the messages differ by some bytes
    assert overlapped < 0.65 * sequential
    compute_only = threaded(0, step_s=(2.0,) * 4)[2]
    assert compute_only == pytest.approx(28.0, rel=0.01)
    assert overlapped > compute_only


def test_a_hundred_virtual_clients_take_no_longer_than_four():
    def simulated(num_clients: int) -> float:
        clock = VirtualClock()
        plan = server_plan(num_clients, 6, 1, schedule="cyclic")
        trainers = [ToyTrainer(i % 4, 1, 1.0) for i in range(num_clients)]
        run_here(initial(4), trainers, plan, Trace(clock), link=Link(0.002, 0.002), in_flight="own")
        return clock.now()

    assert simulated(100) == pytest.approx(simulated(4), rel=0.05)
