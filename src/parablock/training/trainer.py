"""The local training of one client: the protocol `Trainer`, and training on the client's examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parablock.config.keys import RunConfig, TrainSection
from parablock.data.batches import round_batches
from parablock.data.prompts import Example
from parablock.errors import ConfigError
from parablock.model.device_copy import ArrivingVector
from parablock.model.params import Replica
from parablock.training.block_optimizer import GRADIENT_TERMS, Moments
from parablock.training.local import LocalArguments, train_block

OnStep = Callable[[int, int, int], None]
"""(client_id, number of the local step in its round, K)."""


@dataclass(frozen=True)
class Trained:
    """The result of a round's local steps.

    Attributes:
        trained: y^b, or the adapters of a client that sends adapters; flat, fp32, on the CPU or on its way there.
        train_loss: Mean loss over the steps; None: it is not told.
    """

    trained: ArrivingVector
    train_loss: float | None


class Trainer(Protocol):
    """Local training of one client, with its memory between rounds.

    Attributes:
        num_examples: Number of the client's training examples.
        step_time_s: Simulated seconds of a local step; None: as measured.
    """

    num_examples: int
    step_time_s: float | None

    def train(
        self, round_index: int, block_index: int, num_local_steps: int, steps_before: int, working: Sequence[Tensor]
    ) -> Trained:
        """Take the local steps of a round.

        Args:
            round_index: t.
            block_index: b, the block that is trained.
            num_local_steps: K of this round.
            steps_before: The client's local steps of earlier rounds; its batches go on from there.
            working: v, the working parameters to start from: one flat vector for each block.
        """

    def memory(self) -> dict[str, Tensor]:
        """Return the tensors that have to survive a restart."""

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Restore what `memory` returned."""


class LocalTrainer:
    """Trains a block on one client's examples.

    Args:
        client_id: The client.
        examples: The client's training examples.
        replica: The model to train with. Clients that never train at the same time may share one.
        train: The `train` section of the configuration.
        arguments: The arguments of the local optimizer.
        num_rounds: T, which the learning-rate schedule spans.
        seed: The run's seed.
        pad_token_id: The token that pads short examples.
        step_time_s: Simulated seconds of a local step; None: as measured.
        on_step: Called with (client_id, steps of the round that are taken, K) after each step.
        tidy: Called after the steps of each round.
    """

    def __init__(
        self,
        client_id: int,
        examples: Sequence[Example],
        replica: Replica,
        *,
        train: TrainSection,
        arguments: LocalArguments,
        num_rounds: int,
        seed: int,
        pad_token_id: int,
        step_time_s: float | None,
        on_step: OnStep = lambda *_: None,
        tidy: Callable[[], None] = lambda: None,
    ) -> None:
        self._client_id, self._examples, self._replica, self._tidy = client_id, examples, replica, tidy
        self._train, self._arguments, self._seed, self._pad_token_id = train, arguments, seed, pad_token_id
        self._num_rounds, self._on_step = num_rounds, on_step
        self._moments: dict[int, Moments] = {}
        always = len(replica.blocks) == 1  # a block that comes back in every round
        self._keeps_moments = train.optimizer_state == "keep" or (train.optimizer_state == "auto" and always)
        self.num_examples = len(examples)
        self.step_time_s = step_time_s

    def train(
        self, round_index: int, block_index: int, num_local_steps: int, steps_before: int, working: Sequence[Tensor]
    ) -> Trained:
        """Take the local steps of a round; see `Trainer.train`."""
        self._replica.load_all(working)
        result = train_block(
            self._replica,
            block_index,
            working[block_index],
            round_batches(
                self._examples,
                seed=self._seed,
                client_id=self._client_id,
                first_step=steps_before,
                num_local_steps=num_local_steps,
                per_device_train_batch_size=self._train.per_device_train_batch_size,
                gradient_accumulation_steps=self._train.gradient_accumulation_steps,
                pad_token_id=self._pad_token_id,
            ),
            self._arguments,
            # the learning rate follows the rounds, for any number of steps
            first_step=round_index * num_local_steps,
            total_steps=self._num_rounds * num_local_steps,
            moments=self._moments.get(block_index),
            on_step=lambda number: self._on_step(self._client_id, number, num_local_steps),
        )
        if self._keeps_moments:
            self._moments[block_index] = result.moments
        self._tidy()
        return Trained(result.trained, result.train_loss)

    def memory(self) -> dict[str, Tensor]:
        """Return the kept moments as named tensors."""
        return {
            f"{block_index}.{name}": torch.as_tensor(value)
            for block_index, moments in self._moments.items()
            for name, value in vars(moments).items()
        }

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Restore the kept moments."""
        by_block: dict[int, dict[str, Tensor]] = {}
        for key, value in memory.items():
            block_index, name = key.split(".", 1)
            by_block.setdefault(int(block_index), {})[name] = value
        self._moments = {
            block_index: Moments(saved["exp_avg"], saved["exp_avg_sq"], int(saved["step"]))
            for block_index, saved in by_block.items()
        }


def local_arguments(config: RunConfig) -> LocalArguments:
    """Return the arguments of the local optimizer.

    Raises:
        ConfigError: The installed torch has no such optimizer.
    """
    train, federation = config.train, config.federation
    if train.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError([f"train.optimizer: muon needs torch 2.9 or newer, and this is {torch.__version__}"])
    return LocalArguments(
        learning_rate=train.learning_rate,
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_ratio=train.warmup_ratio,
        gradient_checkpointing=train.gradient_checkpointing,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        gradient_terms={
            name: getattr(federation, name)
            for name in GRADIENT_TERMS
            if f"federation.{name}" in federation.traits.own_keys
        },
    )
