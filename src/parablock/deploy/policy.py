"""A site's policy: what a run may ask of it. The site checks it itself, before it reads data and in every round.

A server cannot change or see a policy. It is told which keys refuse a run, in a fixed sentence; the values stay in
the site's log. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from parablock.config.keys import RunConfig, TrainSection
from parablock.config.methods import METHODS, MethodName, cohort_size
from parablock.config.section import Section
from parablock.errors import PolicyError

Part = Literal["layers", "embeddings", "head"]
Metric = Literal["train_loss", "timeline"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

OPTIMIZER_BOUNDS = {"learning_rate": (0.0, 0.1), "adam_epsilon": (0.0, 1e-6)}
"""Bounds where a policy does not give others: with a large epsilon, AdamW's step is the gradient itself."""


class Policy(Section):
    """What a run may ask of this site; the defaults hold where the site's file has no `policy`."""

    secure_aggregation: Literal["required", "any"] = Field(
        "any", description="`required`: updates leave masked, so that the server sees their sum alone."
    )
    min_cohort: int = Field(
        2, ge=1, description="Fewest clients that a round asks; with masks, fewest whose sum is unmasked."
    )
    noise: Literal["own", "any"] = Field("any", description="`own`: this site adds noise itself, to its updates.")
    min_noise_multiplier: float = Field(0.0, ge=0, description="Least `privacy.noise_multiplier`.")
    max_epsilon: float | None = Field(
        None, gt=0, description="Largest ε of all rounds of all runs that this site's `state_dir` remembers."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ that `max_epsilon` belongs to.")
    max_clip_norm: float | None = Field(None, gt=0, description="Largest `privacy.clip_norm`; null: none needed.")
    min_examples_per_round: int = Field(
        8, ge=1, description="Fewest examples behind an update: batch × accumulation × steps, of rows there are."
    )
    max_rounds: int = Field(10_000, ge=1, description="Most rounds of a run.")
    max_local_steps: int = Field(1024, ge=1, description="Most optimizer steps of a round.")
    methods: tuple[MethodName, ...] = Field(tuple(METHODS), min_length=1, description="Methods of a run.")
    blocks: tuple[Part, ...] = Field(
        ("layers",),
        min_length=1,
        description="Parts of the model whose updates may leave: layers, embeddings, head.",
    )
    base_sha256: tuple[Sha256, ...] = Field((), description="Hashes of base models to train on; empty: any.")
    optimizer: Mapping[str, tuple[float, float]] = Field(
        OPTIMIZER_BOUNDS, description="Least and largest value of numbers of `train`; beside the default bounds."
    )
    train_on_prompts: bool = Field(True, description="Whether a run may train on prompts, beside completions.")
    metrics: tuple[Metric, ...] = Field(
        get_args(Metric),
        description="Figures that may leave: the mean loss, and when the site computed and waited.",
    )

    @field_validator("optimizer")
    @classmethod
    def _known_numbers(cls, value: Mapping[str, tuple[float, float]]) -> Mapping[str, tuple[float, float]]:
        numbers = {name for name, key in TrainSection.model_fields.items() if key.annotation in (int, float)}
        if unknown := sorted(set(value) - numbers):
            raise ValueError(f"{', '.join(unknown)}: no number of `train`; there are {', '.join(sorted(numbers))}")
        for name, (least, largest) in value.items():
            if least > largest:
                raise ValueError(f"{name}: {least:g} is above {largest:g}; the least value comes first")
        return {**OPTIMIZER_BOUNDS, **value}


OPEN_POLICY = {
    "min_cohort": 1,
    "min_examples_per_round": 1,
    "max_rounds": 2**31,
    "max_local_steps": 2**31,
    "blocks": list(get_args(Part)),
    "optimizer": {key: [0.0, 1e30] for key in OPTIMIZER_BOUNDS},
}
"""A policy that refuses nothing: for sites that `deploy local` starts, whose operator is the server's."""


@dataclass(frozen=True)
class Breach:
    """Something that a policy forbids: its key, and the whole of it in words, for this site alone."""

    key: str
    words: str


def breaches(policy: Policy, config: RunConfig, base_sha256: str | None) -> Iterator[Breach]:
    """Yield what a run asks for that the policy forbids; the base model is the one that the server names.

    None: it has not named one yet.
    """
    yield from _privacy_breaches(policy, config)
    yield from _training_breaches(policy, config)
    if policy.base_sha256 and base_sha256 is not None and base_sha256 not in policy.base_sha256:
        yield Breach("base_sha256", f"the base model has the hash {base_sha256}, which is not listed")


def _privacy_breaches(policy: Policy, config: RunConfig) -> Iterator[Breach]:
    privacy, cohort = config.privacy, cohort_size(config.federation.model_dump())
    is_masked = privacy.secure_aggregation == "masked"
    if policy.secure_aggregation == "required" and not is_masked:
        yield Breach("secure_aggregation", f"updates would not be masked: {privacy.secure_aggregation}")
    together = cohort - cohort // 3 if is_masked else cohort
    if together < policy.min_cohort:
        what = "whose sum may be unmasked" if is_masked else "that a round asks"
        yield Breach("min_cohort", f"the clients {what} are {together}, not at least {policy.min_cohort}")
    own = own_noise(config)
    if policy.noise == "own" and own == 0:
        yield Breach("noise", "this site would add no noise of its own")
    noise, wanted = own if policy.noise == "own" else privacy.noise_multiplier, policy.min_noise_multiplier
    if noise < wanted:
        whose = "this site's part of the noise" if noise != privacy.noise_multiplier else "noise_multiplier"
        yield Breach("min_noise_multiplier", f"{whose} is {noise:g}, not {wanted:g}")
    if policy.max_clip_norm is not None and (privacy.clip_norm is None or privacy.clip_norm > policy.max_clip_norm):
        yield Breach("max_clip_norm", f"clip_norm is {privacy.clip_norm}, not at most {policy.max_clip_norm:g}")


def own_noise(config: RunConfig) -> float:
    """Return the noise multiplier of an update without the noise of others: of the server, or of sites in a sum."""
    privacy, cohort = config.privacy, cohort_size(config.federation.model_dump())
    if privacy.mode == "distributed":
        return privacy.noise_multiplier / sqrt(cohort - cohort // 3)
    return privacy.noise_multiplier if privacy.mode == "local" else 0.0


def _training_breaches(policy: Policy, config: RunConfig) -> Iterator[Breach]:
    train, federation = config.train, config.federation
    steps = train.num_local_steps
    least, most = (train.min_local_steps, train.max_local_steps) if steps == "auto" else (int(steps), int(steps))
    yield from steps_breaches(policy, config, least, most)
    if federation.num_rounds > policy.max_rounds:
        yield Breach("max_rounds", f"the run has {federation.num_rounds} rounds, not at most {policy.max_rounds}")
    if federation.method not in policy.methods:
        yield Breach("methods", f"the method is {federation.method}, not one of {', '.join(policy.methods)}")
    if forbidden := [part for part in parts_trained(config) if part not in policy.blocks]:
        yield Breach("blocks", f"updates of these parts would leave: {', '.join(forbidden)}")
    for key, (least_value, largest) in policy.optimizer.items():
        if not least_value <= (value := getattr(train, key)) <= largest:
            yield Breach("optimizer", f"train.{key} is {value:g}, not between {least_value:g} and {largest:g}")
    if not policy.train_on_prompts and not train.completion_only_loss:
        yield Breach("train_on_prompts", "train.completion_only_loss is false")
    elif not policy.train_on_prompts and (config.data.columns or config.data.format == "text"):
        yield Breach("train_on_prompts", "data.columns or data.format: text would choose what is learnt of a row")


def steps_breaches(
    policy: Policy, config: RunConfig, least: int, most: int, num_rows: int | None = None
) -> Iterator[Breach]:
    """Yield what is wrong with a round's number of local steps, which lies between two numbers."""
    if most > policy.max_local_steps:
        yield Breach("max_local_steps", f"a round has {most} local steps, not at most {policy.max_local_steps}")
    train = config.train
    examples = least * train.per_device_train_batch_size * train.gradient_accumulation_steps
    examples = examples if num_rows is None else min(examples, num_rows)
    if examples < policy.min_examples_per_round:
        wanted = policy.min_examples_per_round
        yield Breach("min_examples_per_round", f"{examples} examples are behind an update, not at least {wanted}")


def parts_trained(config: RunConfig) -> tuple[Part, ...]:
    """Return the parts of the model that a run trains."""
    trains, blocks = config.federation.traits.trains, config.blocks
    if trains == "everything":
        return get_args(Part)
    ends = {"embeddings": blocks.include_embeddings, "head": blocks.include_head}
    return ("layers", *(part for part in get_args(Part) if trains == "blocks" and ends.get(part)))


def refusal(found: Sequence[Breach], what: str) -> PolicyError:
    """Return the error of a site whose policy forbids what it is asked for."""
    return PolicyError(
        f"this site's policy forbids {what}: " + "; ".join(f"{breach.key}: {breach.words}" for breach in found),
        keys=tuple(dict.fromkeys(breach.key for breach in found)),
        remedy="Agree with the server's operator on another run; or change `policy` in this site's file.",
    )
