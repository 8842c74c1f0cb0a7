"""Local training: K optimizer steps on one block, all other blocks frozen (y^b from v^b).

Gradients, moments and the fp32 master copy exist for the active block alone. Frozen layers below the block run
without a graph; frozen layers above it pass gradients through without computing those of their weights. The model
draws no random number, so a visit is a function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from parablock.data.batches import Batch
from parablock.errors import DataError, TrainingError
from parablock.model.device_copy import ArrivingVector, copy_to_cpu
from parablock.model.loss import count_label_tokens, sum_loss
from parablock.model.params import Replica
from parablock.training.block_optimizer import BlockOptimizer, Moments


@dataclass(frozen=True)
class LocalArguments:
    """Optimizer and schedule of local training; names as in Hugging Face `TrainingArguments`.

    Attributes:
        learning_rate: Peak learning rate.
        optimizer: adamw | muon, which leaves all but the matrices of the decoder layers to AdamW.
        weight_decay: Decoupled decay of the weight matrices; norms and biases have none.
        max_grad_norm: Bound of the norm of the block's gradient; 0 switches clipping off.
        lr_scheduler_type: Shape of the schedule after the warm-up.
        warmup_ratio: Part of the schedule over which the learning rate rises from zero.
        gradient_checkpointing: Recompute activations, from the active block upwards.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        adam_epsilon: AdamW's epsilon.
        gradient_terms: The terms that the method adds to the gradient, each with its weight; see `GRADIENT_TERMS`.
    """

    learning_rate: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "constant"
    warmup_ratio: float = 0.0
    gradient_checkpointing: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    gradient_terms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalResult:
    """The result of K local steps on a block.

    Attributes:
        trained: y^b: flat, fp32, on the CPU or on its way there; `[:]` is the whole vector.
        train_loss: Mean over the steps of the loss per label token, in nats.
        moments: The optimizer's state, for the block's next visit.
    """

    trained: ArrivingVector
    train_loss: float
    moments: Moments


def train_block(
    replica: Replica,
    block_index: int,
    start: Tensor,
    step_batches: Sequence[Sequence[Batch]],
    arguments: LocalArguments,
    *,
    first_step: int,
    total_steps: int,
    moments: Moments | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> LocalResult:
    """Take K = len(step_batches) optimizer steps on one block.

    Afterwards the replica holds no gradient, and the block counts as changed.

    Args:
        replica: The client's model, with its other blocks loaded.
        block_index: The active block.
        start: v^b, the working parameters: flat, the model's dtype; not changed.
        step_batches: The micro-batches of each step.
        arguments: Optimizer and schedule.
        first_step: Place in the schedule of the first of these steps, from zero.
        total_steps: Local steps that the schedule spans.
        moments: The optimizer's state of the block's last visit, not changed; None: a fresh start.
        on_step: Called with the number of steps that are taken, after each.

    Raises:
        TrainingError: A loss or the trained block is not finite.
        DataError: All labels of a step are masked.
    """
    replica.load(block_index, start)
    losses = []
    try:
        replica.activate(block_index, gradient_checkpointing=arguments.gradient_checkpointing)
        parameters = replica.parameters(block_index)
        hidden = replica.blocks[block_index].are_hidden_matrices(parameters)
        with BlockOptimizer(
            parameters,
            replica.buffer(block_index),
            hidden if arguments.optimizer == "muon" else [False] * len(parameters),
            moments,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.weight_decay,
            max_grad_norm=arguments.max_grad_norm,
            gradient_terms=arguments.gradient_terms,
        ) as optimizer:
            for step, micro_batches in enumerate(step_batches, first_step):
                learning_rate = learning_rate_at(arguments, step, total_steps)
                where = f"block {block_index}, local step {step}, learning rate {learning_rate:.3g}"
                losses.append(_accumulate_gradients(replica.model, micro_batches, where))
                optimizer.step(learning_rate)
                on_step(len(losses))
            if not optimizer.weights.isfinite().all():
                raise _not_finite(
                    "The trained block", f"block {block_index}, {len(losses)} steps from {first_step}"
                )
            trained = copy_to_cpu(optimizer.weights)
    finally:
        replica.deactivate()
        replica.invalidate(block_index)
    return LocalResult(trained, math.fsum(losses) / len(losses), optimizer.moments())


def learning_rate_at(arguments: LocalArguments, step: int, total_steps: int) -> float:
    """Return the learning rate of a local step, counted from zero.

    The schedules are those of `transformers.get_scheduler`, whose import takes as long as half of torch's.
    """
    warmup, step = math.ceil(arguments.warmup_ratio * total_steps), min(step, total_steps)
    rest = max(1, total_steps - warmup)
    if step < warmup:
        factor = step / warmup
    else:
        factor = {
            "constant": 1.0,
            "linear": (total_steps - step) / rest,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / rest))),
        }[arguments.lr_scheduler_type]
    return arguments.learning_rate * factor


def _accumulate_gradients(model: PreTrainedModel, micro_batches: Sequence[Batch], where: str) -> float:
    """Accumulate the gradients of a step's loss per label token of all its micro-batches; return the loss."""
    label_tokens = sum(count_label_tokens(batch.labels_BT) for batch in micro_batches)
    if not label_tokens:
        raise DataError(
            f"There is no label token to train on ({where})",
            cause="All labels of the step's examples are masked: completions are empty or were cut off.",
            remedy="Raise data.max_length, or look at the examples that were reported as masked.",
        )
    total = 0.0
    for batch in micro_batches:
        summed = sum_loss(
            model,
            input_ids_BT=batch.input_ids_BT,
            attention_mask_BT=batch.attention_mask_BT,
            labels_BT=batch.labels_BT,
        )
        loss = summed / label_tokens
        total += loss.item()
        if not math.isfinite(total):
            raise _not_finite("The training loss", where)
        loss.backward()  # type: ignore[no-untyped-call]
    return total


def _not_finite(subject: str, where: str) -> TrainingError:
    return TrainingError(
        f"{subject} is not finite ({where})",
        cause="Most often the learning rate is too high; or a weight of the model is not finite.",
        remedy="Lower train.learning_rate, or set train.max_grad_norm: 1.0.",
    )
