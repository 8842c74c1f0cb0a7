"""The keys of a configuration, with defaults and descriptions: one frozen tree, validated on construction.

Users rely on names and defaults. Training arguments have the names of Hugging Face `TrainingArguments` and of TRL.
Nothing is ignored: a key without effect, or a value that is not built yet, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from parablock.config.conflicts import refuse_conflicts
from parablock.config.data_section import DataSection, one_or_many
from parablock.config.methods import LAGGING, METHODS, RATES, Method, MethodName, fewest_asked
from parablock.config.section import FaultSection, Section, default_of
from parablock.data.sources import may_be_several


def _at_least_one(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"must be at least 1, not {value}")
    return value


class ModelSection(Section):
    """The model to fine-tune, its precision and its device."""

    name_or_path: str = Field(min_length=1, description="Hugging Face id or a folder.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the parameters.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where local training runs.")
    init: Literal["pretrained", "random"] = Field("pretrained", description="Read the weights, or draw them.")


class BlocksSection(Section):
    """The partition of the model and the order in which blocks are trained."""

    layers_per_block: int | Literal["auto"] = Field(
        1,
        description="Decoder layers in a block; `auto`: enough for four rounds of each block, or for at least four "
        "blocks, and more where the computation hides their exchange.",
    )
    split: Literal["layer", "attention_mlp"] = Field(
        "layer", description="Whole layers, or their attention and their MLPs."
    )
    include_embeddings: bool = Field(False, description="Make the embeddings a block of their own.")
    include_head: bool = Field(False, description="Make the final norm and the head a block of their own.")
    schedule: Literal["cyclic", "reversed", "shuffled", "random", "importance"] = Field(
        "shuffled", description="The order of the blocks."
    )
    layers_path: str | None = Field(None, description="Where an unknown architecture keeps its decoder layers.")
    allow_unvisited: bool = Field(False, description="Run although some block would never be trained.")

    _positive = field_validator("layers_per_block")(_at_least_one)


class ServerOptimizerSection(Section):
    """The server's optimizer, which takes a block's mean delta."""

    name: Literal["none", "momentum", "adam"] = Field("none", description="`none` adds the mean delta itself.")
    learning_rate: float = Field(1.0, gt=0, le=10, description="Server learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum, and the first moment's decay of `adam`.")

    @model_validator(mode="after")
    def _none_takes_the_mean(self) -> ServerOptimizerSection:
        for key in ("learning_rate", "momentum"):
            if self.name == "none" and getattr(self, key) != default_of(self, key):
                raise ValueError(f"{key} has no effect with name none; choose momentum or adam, or leave it out")
        return self


class LoraSection(Section):
    """The adapters of the methods that train some."""

    rank: int = Field(8, ge=1, description="Rank of an adapter.")
    alpha: float = Field(16.0, gt=0, description="An adapter counts alpha / rank times.")
    target_modules: tuple[str, ...] = Field(
        (), description="Ends of module names, such as `q_proj`; empty: every matrix of the decoder layers."
    )


class FederationSection(Section):
    """Clients, rounds, and the method that joins them."""

    method: MethodName = Field(
        "parablock",
        description="The trained part of the model, the clients of a round, and the use of their updates.",
    )
    num_clients: int = Field(8, ge=1, description="Number of clients.")
    participation: float = Field(1.0, gt=0, le=1, description="Part of the clients that is asked in a round.")
    num_rounds: int = Field(64, ge=1, description="Number of rounds (T).")
    delay: int = Field(
        1,
        ge=0,
        le=64,
        description="Rounds that an update may be in flight (d). Where none is given: 1 with parablock, else 0.",
    )
    min_updates: int = Field(1, ge=1, description="Fewest updates that a commit needs.")
    deadline_factor: float | None = Field(
        None, gt=1, description="A round waits for this multiple of the median answer time; null: for all answers."
    )
    in_flight: Literal["aligned", "mean", "share", "own", "none"] = Field(
        "aligned", description="Weight of own updates in flight."
    )
    server_optimizer: ServerOptimizerSection = ServerOptimizerSection()
    proximal_mu: float = Field(0.01, gt=0, description="Weight μ of fedprox's proximal term.")
    aggregation: Literal["mean", "median", "trimmed_mean", "krum"] = Field("mean", description="Aggregation rule.")
    trim_fraction: float = Field(0.2, gt=0, lt=0.5, description="Part of the clients cut at either end.")
    assumed_attackers: int = Field(1, ge=0, description="Hostile clients that `krum` withstands.")
    max_client_examples: int | None = Field(
        None, ge=1, description="Largest weight of a client in the mean: further examples do not count; null: none."
    )
    excluded_clients: tuple[int, ...] = Field((), description="Clients that take no part: forgotten ones, say.")
    stall_timeout_s: float = Field(
        600.0, gt=0, description="Seconds without progress before a peer counts as stalled."
    )

    @model_validator(mode="before")
    @classmethod
    def _method_fixes_delay(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        name = value.get("method", cls.model_fields["method"].default)
        method = METHODS.get(name) if isinstance(name, str) else None
        if method is None:  # pydantic says which names there are
            return value
        if value.setdefault("delay", method.delay) != 0 and not method.may_lag:
            lagging = " or ".join(LAGGING)
            raise ValueError(
                f"method {name} has delay 0, not {value['delay']}: it {method.no_delay}; "
                f"for a delay choose {lagging}"
            )
        if value.get("delay") == 0 and method.without_delay is not None:
            value["method"] = method.without_delay
        return value

    @property
    def traits(self) -> Method:
        """The row of the method."""
        return METHODS[self.method]

    @property
    def fewest_asked(self) -> int:
        """The fewest clients that a round asks."""
        return fewest_asked(self.model_dump())

    @model_validator(mode="after")
    def _rules_take_their_own(self) -> FederationSection:
        for key, rule in (("trim_fraction", "trimmed_mean"), ("assumed_attackers", "krum")):
            if self.aggregation != rule and getattr(self, key) != default_of(self, key):
                raise ValueError(f"{key} takes effect with aggregation: {rule} only, not with {self.aggregation}")
        return self


class TrainSection(Section):
    """Local training; names as in Hugging Face `TrainingArguments` and TRL."""

    num_local_steps: int | Literal["auto"] = Field(
        8, description="Optimizer steps of a round (K); `auto`: for each client what fills the round."
    )
    min_local_steps: int = Field(1, ge=1, description="Lower bound of `num_local_steps: auto`.")
    max_local_steps: int = Field(64, ge=1, description="Upper bound of `num_local_steps: auto`.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Examples of a micro-batch.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches of an optimizer step.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="Local optimizer; `muon`: of the matrices of the decoder layers, with AdamW for the rest.",
    )
    learning_rate: float = Field(
        RATES["adamw"]["blocks"],
        gt=0,
        description="Peak learning rate. Where none is given, that of the method: "
        + ", ".join(f"{rate:g} where it trains {trains}" for trains, rate in RATES["adamw"].items())
        + "; with `muon` "
        + ", ".join(f"{rate:g}" for rate in RATES["muon"].values())
        + ".",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of weight matrices (not of norms and biases).")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient norm clip of the block; 0 switches it off.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    optimizer_state: Literal["reset", "keep", "auto"] = Field(
        "reset", description="Moments at a block's next visit; `auto`: keep them where every round trains all."
    )
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = Field("constant", description="Over all rounds.")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Part of all steps that warms up.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations from the block upwards.")
    completion_only_loss: bool = Field(True, description="Train on completions, not on prompts.")

    _positive = field_validator("num_local_steps")(_at_least_one)

    @model_validator(mode="after")
    def _bounds_of_auto(self) -> TrainSection:
        bounds = (self.min_local_steps, self.max_local_steps)
        if self.num_local_steps != "auto":
            if bounds != (1, 64):
                raise ValueError("min_local_steps and max_local_steps take effect with num_local_steps: auto only")
        elif bounds[0] > bounds[1]:
            raise ValueError(f"min_local_steps {bounds[0]} is above max_local_steps {bounds[1]}")
        return self


class WireSection(Section):
    """The encoding of updates and new values."""

    format: Literal["float32", "bfloat16", "int8", "int4", "int2", "sparse2"] = Field(
        "float32", description="Payload of updates, and of new values where it is narrower than the model."
    )
    density: float = Field(
        0.02,
        ge=0.005,
        le=0.05,
        description="The part of the elements that `sparse2` sends; three times as many return.",
    )
    rounding: Literal["stochastic", "nearest"] = Field("stochastic", description="Rounding of int8, int4, int2.")
    error_feedback: bool = Field(False, description="Carry the rounding residual of a block to its next visit.")
    residual_decay: float = Field(1.0, ge=0.95, le=1, description="The part of that residual that is carried.")
    streaming: bool = Field(True, description="Exchange in chunks, up and down at once.")
    chunk_bytes: int = Field(4_194_304, ge=1024, description="Bytes of a chunk where streaming.")

    @model_validator(mode="before")
    @classmethod
    def _sparse_has_feedback(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("format") == "sparse2":
            return {"error_feedback": True, **value}
        return value

    @model_validator(mode="after")
    def _takes_effect(self) -> WireSection:
        if self.format != "sparse2" and self.density != default_of(self, "density"):
            raise ValueError(f"density takes effect with format: sparse2 only, not with {self.format}")
        if self.format == "sparse2" and not self.error_feedback:
            raise ValueError("error_feedback: false would lose what sparse2 does not send for good; leave it out")
        if not self.error_feedback and self.residual_decay != default_of(self, "residual_decay"):
            raise ValueError("residual_decay takes effect with error_feedback: true only")
        if self.rounding == "nearest" and not self.format.startswith("int"):
            raise ValueError(
                f"rounding: nearest takes effect with int8, int4 and int2 only, not with {self.format}"
            )
        if self.error_feedback and self.format == "float32":
            raise ValueError("error_feedback: true takes effect where updates are rounded, not with float32")
        if not self.streaming and self.chunk_bytes != default_of(self, "chunk_bytes"):
            raise ValueError("chunk_bytes takes effect with streaming: true only")
        return self


class LinkSection(Section):
    """The link between each client and the server; null is unlimited."""

    upload_mbps: float | None = Field(None, gt=0, description="Client to server, 10^6 bit/s.")
    download_mbps: float | None = Field(None, gt=0, description="Server to client, 10^6 bit/s.")
    latency_s: float = Field(0.0, ge=0, description="One way, seconds.")


class EngineSection(Section):
    """The engine of server and clients, and its clock."""

    name: Literal["inprocess", "remote", "flower"] = Field(
        "inprocess", description="All in one process, real sites, or real sites that Flower starts."
    )
    clock: Literal["real", "virtual"] = Field("real", description="Real time, or discrete-event simulation.")
    num_threads: int | None = Field(None, ge=1, description="Torch threads of a client; null: a fair share.")
    step_time_s: float | None = Field(
        None,
        gt=0,
        description="Virtual clock: seconds of a local step, and aggregation takes none. Null: as measured.",
    )

    @model_validator(mode="after")
    def _step_time_is_virtual(self) -> EngineSection:
        if self.step_time_s is not None and self.clock == "real":
            raise ValueError("step_time_s takes effect under clock: virtual only")
        if self.name != "inprocess" and self.clock == "virtual":
            raise ValueError(f"name: {self.name} runs in real time; leave clock: real")
        return self


class EvaluationSection(Section):
    """Evaluation of the committed model on the test rows."""

    every_rounds: int = Field(8, ge=0, description="Rounds between evaluations; 0: first and last only.")
    max_examples: int = Field(256, ge=1, description="Test examples used, the same ones every time.")
    per_device_eval_batch_size: int = Field(16, ge=1, description="Examples of an evaluation batch.")
    num_answers: int = Field(3, ge=0, description="Test prompts that base and tuned model answer; 0: none.")


class CheckpointSection(Section):
    """Checkpoints of the run."""

    every_rounds: int = Field(8, ge=0, description="Rounds between checkpoints; 0: only when interrupted.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")


class PrivacySection(Section):
    """Differential privacy and secure aggregation."""

    clip_norm: float | None = Field(None, gt=0, description="Norm that no update may exceed; null: any.")
    noise_multiplier: float = Field(0.0, ge=0, description="Noise standard deviation / clip_norm.")
    mode: Literal["central", "local", "distributed"] = Field(
        "central",
        description="The server adds noise to the mean; or each client to its update, enough for itself; or all "
        "clients together, each a part of what a masked sum needs.",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ that the reported epsilon belongs to.")
    secure_aggregation: Literal["none", "plain", "masked"] = Field(
        "none", description="Hiding of single updates from the server."
    )

    @model_validator(mode="after")
    def _noise_needs_a_bound(self) -> PrivacySection:
        if self.noise_multiplier > 0 and self.clip_norm is None:
            raise ValueError("noise_multiplier needs clip_norm: noise hides an update of a bounded norm only")
        for key in ("mode", "delta"):
            if self.noise_multiplier == 0 and getattr(self, key) != default_of(self, key):
                raise ValueError(f"{key} takes effect with noise_multiplier above 0 only")
        return self


Tracker = Literal["tensorboard", "wandb"]


class RunConfig(Section):
    """A whole run. Only `model.name_or_path` and `data.train` have no default."""

    model: ModelSection
    data: DataSection
    blocks: BlocksSection = BlocksSection()
    federation: FederationSection = FederationSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    wire: WireSection = WireSection()
    link: LinkSection = LinkSection()
    engine: EngineSection = EngineSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    privacy: PrivacySection = PrivacySection()
    faults: tuple[FaultSection, ...] = Field((), description="What is to go wrong on purpose, with whom and when.")
    report_to: tuple[Tracker, ...] = Field((), description="Trackers that are told the figures of each round.")
    seed: int = Field(0, ge=0, lt=2**31, description="Everything random follows from it.")

    _names = field_validator("report_to", mode="before")(one_or_many)

    @model_validator(mode="before")
    @classmethod
    def _method_has_a_rate(cls, value: Any) -> Any:
        """Fill in the method's learning rate; it does not count as set (`model_fields_set`)."""
        if not isinstance(value, Mapping):
            return value
        try:  # what is wrong in these sections is told at its place, when they are validated
            federation = FederationSection.model_validate(value.get("federation", {}))
            train = TrainSection.model_validate(value.get("train", {}))
        except ValidationError:
            return value
        if "learning_rate" in train.model_fields_set:
            return value
        rate = federation.traits.learning_rate(train.optimizer)
        train = TrainSection.model_construct(train.model_fields_set, **vars(train) | {"learning_rate": rate})
        return {**value, "train": train}

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{', '.join(value)}: name each tracker once")
        return value

    @model_validator(mode="after")
    def _files_are_clients(self) -> RunConfig:
        files, clients = len(self.data.train), self.federation.num_clients
        one_each = not any(map(may_be_several, self.data.train))
        if self.data.partition.scheme == "by_file" and one_each and files and files != clients:
            raise ValueError(
                f"data.partition.scheme by_file makes one client of each file: data.train has {files} and "
                f"federation.num_clients is {clients}; make them equal"
            )
        return self

    @model_validator(mode="after")
    def _nothing_contradicts(self) -> RunConfig:
        refuse_conflicts(self.model_dump(), self.model_dump(exclude_defaults=True))
        return self

    @property
    def schedule(self) -> str:
        """The order of the groups that rounds train: that of the blocks, and adapters' matrices in turn."""
        return self.blocks.schedule if self.federation.traits.trains == "blocks" else "cyclic"

    def to_yaml(self) -> str:
        """Return every key with its value as YAML, in the order of the reference."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
