"""The methods of federated fine-tuning, a row of traits each; other files read traits and never compare names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

RATES = {
    "adamw": {"blocks": 5e-4, "everything": 5e-5, "adapters": 1e-3},
    "muon": {"blocks": 5e-3, "everything": 5e-4, "adapters": 3e-3},
}
"""The peak learning rate where none is configured, by `train.optimizer` and `Method.trains`, as searches on an LLM
chose it (`benchmarks/llm.py llm_search`; that of Muon on everything is by its ratio on small models)."""


@dataclass(frozen=True)
class Method:
    """The traits of a method.

    Attributes:
        title: The name in the literature.
        source: The publication; empty for a bound that is not published.
        summary: The difference to other methods, in one sentence for the documentation.
        trains: One block a round, all parameters, or LoRA adapters.
        combines: The server's result of a round's updates: their mean, their stack, or nothing without updates.
        asks: Whether a round asks a cohort, or one client at a time in turn.
        delay: `federation.delay` where none is given.
        no_delay: The reason why no update may be in flight, after the method's name; empty: any delay will do.
        without_delay: The method's name with a delay of 0; None: the same.
        pools_data: Whether one client has the rows of all.
        matrices: The groups of adapter matrices that are trained; each is a block, and rounds take them in turn.
        own_keys: Keys and sections that have an effect with the methods that list them only.
        refuses: Keys that have to stay at their default, with the end of the error after the value.
    """

    title: str
    source: str
    summary: str
    trains: Literal["blocks", "everything", "adapters"]
    combines: Literal["mean", "stack", "nothing"] = "mean"
    asks: Literal["cohort", "one_in_turn"] = "cohort"
    delay: int = 0
    no_delay: str = ""
    without_delay: str | None = None
    pools_data: bool = False
    matrices: tuple[tuple[Literal["A", "B"], ...], ...] = ()
    own_keys: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)

    def learning_rate(self, optimizer: str) -> float:
        """Return the peak learning rate where none is configured (`train.learning_rate`)."""
        return RATES[optimizer][self.trains]

    @property
    def may_lag(self) -> bool:
        """Whether an update may be in flight for some rounds (`federation.delay`)."""
        return not self.no_delay

    @property
    def trains_one_group(self) -> bool:
        """Whether every round trains the same group of parameters, so that with a delay it is always in flight."""
        return self.trains == "everything" or len(self.matrices) == 1

    @property
    def sends(self) -> bool:
        """Whether clients send anything to the server."""
        return self.combines != "nothing"

    @property
    def gathers(self) -> bool:
        """Whether a round gathers the updates of a cohort."""
        return self.sends and self.asks == "cohort"

    @property
    def averages(self) -> bool:
        """Whether the server makes a mean of these updates."""
        return self.gathers and self.combines == "mean"


NO_MEAN = {
    "mean": "whose updates never meet",
    "stack": "which stacks updates and makes no mean of them",
    "nothing": "which sends nothing, so that updates never meet",
}
"""Reasons why there is no mean of several updates, by `Method.combines`."""

NOTHING_IN_FLIGHT = "sends nothing that could be in flight"
NOTHING_TO_CARRY = {"engine.name": "has nothing to carry where clients send nothing; use inprocess"}

METHODS: dict[str, Method] = {
    "parablock": Method(
        "ParaBlock",
        "Wang, Cao, Chen, 2025, arXiv 2511.19959",
        "An update is in flight while the next block is trained.",
        trains="blocks",
        delay=1,
        without_delay="fl_bcd",
    ),
    "fl_bcd": Method(
        "FL-BCD",
        "Wang, Cao, Chen, 2025, arXiv 2511.19959",
        "ParaBlock with delay 0.",
        trains="blocks",
        no_delay="is parablock without one",
    ),
    "fedavg": Method(
        "FedAvg", "McMahan et al., 2017, arXiv 1602.05629", "The server averages the models.", trains="everything"
    ),
    "fedit": Method(
        "FedIT",
        "Zhang et al., 2023, arXiv 2305.05644",
        "The server averages A and B apart.",
        trains="adapters",
        matrices=(("A", "B"),),
        own_keys=("lora",),
    ),
    "ffa_lora": Method(
        "FFA-LoRA",
        "Sun et al., 2024, arXiv 2403.12313",
        "A stays as it was drawn, so the mean is exact.",
        trains="adapters",
        matrices=(("B",),),
        own_keys=("lora",),
    ),
    "rolora": Method(
        "RoLoRA",
        "Chen et al., 2025, arXiv 2502.01755",
        "Rounds train B and A in turn, so each mean is exact.",
        trains="adapters",
        matrices=(("B",), ("A",)),
        own_keys=("lora",),
    ),
    "flora": Method(
        "FLoRA",
        "Wang et al., 2024, arXiv 2409.05976",
        "The server stacks the adapters; the product is added to the matrices, and new ones are drawn.",
        trains="adapters",
        combines="stack",
        no_delay="makes no mean that an own update in flight could stand for",
        matrices=(("A", "B"),),
        own_keys=("lora",),
        refuses={
            "wire.error_feedback": "has nothing to carry with flora, whose adapters are new in each round",
            "wire.streaming": "has no effect with flora: a stack goes down whole; leave it out",
            "wire.chunk_bytes": "has no effect with flora: a stack goes down whole; leave it out",
            "train.optimizer_state": "has nothing to keep with flora, whose adapters are new in each round",
        },
    ),
    "fedcybgd": Method(
        "FedCyBGD",
        "Wang et al., 2024, arXiv 2406.11187",
        "One client trains in a round; clients take turns.",
        trains="blocks",
        asks="one_in_turn",
        no_delay="has clients take turns, each from the result of the one before",
    ),
    "fedprox": Method(
        "FedProx",
        "Li et al., 2020, arXiv 1812.06127",
        "A proximal term in the local loss holds the weights near those of the round's start.",
        trains="everything",
        own_keys=("federation.proximal_mu",),
    ),
    "local": Method(
        "local",
        "",
        "Every client trains for itself; scores are means over the clients' models.",
        trains="everything",
        combines="nothing",
        no_delay=NOTHING_IN_FLIGHT,
        refuses=NOTHING_TO_CARRY,
    ),
    "central": Method(
        "central",
        "",
        "One client has the data of all.",
        trains="everything",
        combines="nothing",
        no_delay=NOTHING_IN_FLIGHT,
        pools_data=True,
        refuses=NOTHING_TO_CARRY,
    ),
}

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]

LAGGING = tuple(name for name, method in METHODS.items() if method.may_lag)
"""The names of the methods that may have a delay."""

OWNERS: dict[str, tuple[str, ...]] = {
    key: tuple(name for name, method in METHODS.items() if key in method.own_keys)
    for key in sorted({key for method in METHODS.values() for key in method.own_keys})
}
"""Key or section → the methods that it belongs to."""


def with_delay(name: str) -> str | None:
    """Return the name of a method with a delay; None if it cannot have one."""
    return next((lagging for lagging in LAGGING if name in (lagging, METHODS[lagging].without_delay)), None)


def without_effect(name: str, delay: int) -> dict[str, str]:
    """Return the keys and sections that do nothing with a method and a delay, each with the reason.

    Those of `OWNERS` are not among them, nor what promises more than another method keeps, such as privacy.
    """
    method, found = METHODS[name], dict[str, str]()
    if method.trains != "blocks":
        found["blocks"] = f"has no effect with method {name}, which trains no blocks"
    if not method.gathers:
        why = "where one client at a time is asked" if method.sends else "which sends nothing"
        for key in ("federation.deadline_factor", "federation.min_updates", *["wire"] * (not method.sends)):
            found[key] = f"has no effect with method {name}, {why}"
    if delay == 0:
        found["federation.in_flight"] = "has no effect with a delay of 0, where nothing is in flight"
    return found


def may_fit_blocks(config: Mapping[str, Any]) -> bool:
    """Return whether `blocks.layers_per_block: auto` can follow from the machine, and from a number of steps."""
    engine, steps = config["engine"].get("name", "inprocess"), config["train"].get("num_local_steps")
    return bool(engine == "inprocess" and steps != "auto")


def cohort_size(federation: Mapping[str, Any]) -> int:
    """Return the number of clients that are drawn for a round."""
    method = METHODS[federation["method"]]
    if method.asks == "one_in_turn" or method.pools_data:
        return 1
    return max(1, round(float(federation["participation"]) * int(federation["num_clients"])))


def fewest_asked(federation: Mapping[str, Any]) -> int:
    """Return the fewest clients that a round asks: of those that are drawn, the excluded ones take no part."""
    return max(1, cohort_size(federation) - len(set(federation["excluded_clients"])))
