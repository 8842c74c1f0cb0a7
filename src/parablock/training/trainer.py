"""Local training of one client: its examples, its copy of the model, its optimizer arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from parablock.config.keys import RunConfig, TrainSection
from parablock.data.batches import round_batches
from parablock.data.prompts import Example
from parablock.model.device_copy import ArrivingVector
from parablock.model.params import Replica
from parablock.training.adamw import GRADIENT_TERMS
from parablock.training.local import LocalArguments, Moments, train_block
from parablock.wire.messages import RoundStart


class LocalTrainer:
    """Trains a block on one client's examples.

    Args:
        client_id: Whose examples.
        examples: Its training examples.
        replica: The model that it trains with. Clients whose turns never overlap may share one.
        train: The `train` section of the configuration.
        arguments: The same for the local optimizer.
        num_rounds: T, which the learning-rate schedule spans.
        seed: The run's seed.
        pad_token_id: What short examples are padded with.
        step_time_s: Simulated seconds of a local step; None: as measured.
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
    ) -> None:
        self._client_id, self._examples, self._replica = client_id, examples, replica
        self._train, self._arguments, self._seed, self._pad_token_id = train, arguments, seed, pad_token_id
        self._num_rounds = num_rounds
        self._moments: dict[int, Moments] = {}
        self.num_examples = len(examples)
        self.step_time_s = step_time_s

    def train(self, start: RoundStart, working: tuple[Tensor, ...]) -> Trained:
        """Take the round's local steps on its block, starting from the working parameters."""
        self._replica.load_all(working)
        block_index, num_local_steps = start.block_index, start.num_local_steps
        result = train_block(
            self._replica,
            block_index,
            working[block_index],
            round_batches(
                self._examples,
                seed=self._seed,
                client_id=self._client_id,
                first_step=start.steps_before,
                num_local_steps=num_local_steps,
                per_device_train_batch_size=self._train.per_device_train_batch_size,
                gradient_accumulation_steps=self._train.gradient_accumulation_steps,
                pad_token_id=self._pad_token_id,
            ),
            # the learning rate follows the rounds, whatever number of steps each of them has
            replace(self._arguments, total_steps=self._num_rounds * num_local_steps),
            first_step=start.round_index * num_local_steps,
            moments=self._moments.get(block_index),
        )
        if self._train.optimizer_state == "keep":
            self._moments[block_index] = result.moments
        return Trained(result.trained, result.train_loss)

    def memory(self) -> dict[str, Tensor]:
        """Give the kept moments as named tensors."""
        return {
            f"{block_index}.{name}": torch.as_tensor(value)
            for block_index, moments in self._moments.items()
            for name, value in vars(moments).items()
        }

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Take the kept moments back."""
        by_block: dict[int, dict[str, Tensor]] = {}
        for key, value in memory.items():
            block_index, name = key.split(".", 1)
            by_block.setdefault(int(block_index), {})[name] = value
        self._moments = {
            block_index: Moments(saved["exp_avg"], saved["exp_avg_sq"], int(saved["step"]))
            for block_index, saved in by_block.items()
        }


def local_arguments(config: RunConfig) -> LocalArguments:
    """Give what the local optimizer follows."""
    train, federation = config.train, config.federation
    return LocalArguments(
        learning_rate=train.learning_rate,
        total_steps=federation.num_rounds,
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


@dataclass(frozen=True)
class Trained:
    """What K local steps gave.

    Attributes:
        trained: y^b, flat, fp32, on the CPU or on its way there; of a client that sends adapters, these.
        train_loss: Mean loss over the steps.
    """

    trained: ArrivingVector
    train_loss: float


class Trainer(Protocol):
    """Local training of one client, and what it remembers between rounds."""

    num_examples: int
    step_time_s: float | None
    """Simulated seconds of a local step; None: as measured."""

    def train(self, start: RoundStart, working: tuple[Tensor, ...]) -> Trained:
        """Take the round's local steps on its block, starting from the working parameters."""

    def memory(self) -> dict[str, Tensor]:
        """Give what has to survive a restart."""

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Take back what `memory` gave."""
