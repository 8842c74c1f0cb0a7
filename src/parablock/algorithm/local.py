"""Local training: K AdamW steps on the active block, all other blocks frozen (y^b from v^b).

Gradients, moments and the fp32 master copy exist for the active block alone. Autograd does the rest: the
frozen layers below the block run without a graph, and the frozen layers above it pass gradients through
without computing those of their weights. The model sees no random number, so a visit is a function of its
arguments.

Shapes: B examples of a micro-batch, T positions, N positions that predict a label token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel, get_scheduler

from parablock.errors import DataError, TrainingError
from parablock.model.params import Replica

if TYPE_CHECKING:
    from parablock.data.batches import Batch

IGNORED = -100
"""The label of a position that is not trained on."""


@dataclass(frozen=True)
class LocalArguments:
    """How a block is trained; names as in Hugging Face `TrainingArguments`.

    Attributes:
        learning_rate: Peak learning rate of AdamW.
        total_steps: Local steps of the whole run (num_rounds × K), which the schedule spans.
        weight_decay: Decoupled decay of the weight matrices; norms and biases have none.
        max_grad_norm: Bound of the norm of the block's gradient; 0 switches clipping off.
        lr_scheduler_type: Shape of the schedule after the warm-up.
        warmup_ratio: Part of `total_steps` over which the learning rate rises from zero.
        gradient_checkpointing: Recompute activations, from the active block upwards.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        adam_epsilon: AdamW's epsilon.
    """

    learning_rate: float
    total_steps: int
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "constant"
    warmup_ratio: float = 0.0
    gradient_checkpointing: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8


@dataclass(frozen=True)
class Moments:
    """AdamW's state of one block between visits.

    Attributes:
        exp_avg: First moment: flat, fp32, on the model's device.
        exp_avg_sq: Second moment, likewise.
        step: Optimizer steps that made them.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


@dataclass(frozen=True)
class LocalResult:
    """What K local steps made of a block.

    Attributes:
        trained: y^b: flat, fp32, CPU.
        train_loss: Mean over the steps of the loss per label token, in nats.
        moments: The optimizer's state, to be given to the block's next visit or dropped.
    """

    trained: Tensor
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
    moments: Moments | None,
) -> LocalResult:
    """Take K = len(step_batches) AdamW steps on one block.

    A bf16 block is stepped in an fp32 master copy, into which gradients move as they are made; an fp32
    block is stepped in place. Afterwards the replica holds no gradient, and the block counts as changed.

    Args:
        replica: The client's model, whose other blocks are loaded already.
        block_index: The active block.
        start: v^b, the working parameters: flat, the model's dtype. It is not changed.
        step_batches: The micro-batches of each step.
        arguments: Optimizer and schedule.
        first_step: Number of local steps before these in the run, for the schedule.
        moments: The optimizer's state at the end of the block's last visit, to go on from; it is not
            changed. None starts anew.

    Returns:
        The trained block, the loss, and the optimizer's state.

    Raises:
        TrainingError: If a loss or the trained block is not finite.
        DataError: If all labels of a step are masked.
    """
    replica.load(block_index, start)
    replica.activate(block_index, gradient_checkpointing=arguments.gradient_checkpointing)
    optimizer = _BlockAdamW(replica, block_index, arguments, moments)
    losses = []
    try:
        for step, micro_batches in enumerate(step_batches, first_step):
            learning_rate = learning_rate_at(arguments, step)
            where = f"block {block_index}, local step {step}, learning rate {learning_rate:.3g}"
            losses.append(_accumulate_gradients(replica.model, micro_batches, where))
            optimizer.step(learning_rate)
        trained = optimizer.trained()
    finally:
        optimizer.close()
        replica.deactivate()
        replica.invalidate(block_index)
    if not trained.isfinite().all():
        raise _not_finite("The trained block", f"block {block_index}, {len(losses)} steps from {first_step}")
    return LocalResult(trained, math.fsum(losses) / len(losses), optimizer.moments())


def learning_rate_at(arguments: LocalArguments, step: int) -> float:
    """Give the learning rate of a local step of the run, by the schedules of Transformers.

    Args:
        arguments: Peak, shape, warm-up and span of the schedule. A constant schedule with a warm-up is
            Transformers' `constant_with_warmup`.
        step: 0-based local step of the run.
    """
    warmup = math.ceil(arguments.warmup_ratio * arguments.total_steps)
    name: str = arguments.lr_scheduler_type
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    unused = torch.optim.SGD([torch.zeros(())], lr=1.0)
    schedule = get_scheduler(name, unused, num_warmup_steps=warmup, num_training_steps=arguments.total_steps)
    return arguments.learning_rate * float(schedule.lr_lambdas[0](min(step, arguments.total_steps)))


def num_label_tokens(batch: Batch) -> int:
    """Count the label tokens that some position predicts; the first position of a row has no predictor."""
    return int((batch.labels_BT[:, 1:] != IGNORED).sum())


def label_token_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Sum the next-token cross-entropy over the label tokens of a batch, in fp32.

    Logits are made only where a label token is predicted: the hidden states of the other positions are
    left out on their way into the head.

    Args:
        model: A causal language model.
        batch: A micro-batch, on any device.

    Returns:
        The sum in nats (a scalar); divided by `num_label_tokens` it is Hugging Face's loss.
    """
    device = model.device
    next_BT = pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORED).to(device)
    predicts_BT = next_BT != IGNORED
    selected = False

    def select(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal selected
        selected = True
        return (inputs[0][predicts_BT].unsqueeze(0), *inputs[1:])

    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(select)
    try:
        logits = model(
            input_ids=batch.input_ids_BT.to(device),
            attention_mask=batch.attention_mask_BT.to(device),
            use_cache=False,
        ).logits
    finally:
        if hook is not None:
            hook.remove()
    logits_NV = logits.squeeze(0) if selected else logits[predicts_BT]
    return cross_entropy(logits_NV.float(), next_BT[predicts_BT], reduction="sum")


def _accumulate_gradients(model: PreTrainedModel, micro_batches: Sequence[Batch], where: str) -> float:
    """Add up the gradients of a step's loss, normalised by the label tokens of all its micro-batches."""
    counts = [num_label_tokens(batch) for batch in micro_batches]
    if not sum(counts):
        raise DataError(
            f"There is no label token to train on ({where})",
            cause="All labels of the step's examples are masked: completions are empty or were cut off.",
            remedy="Raise data.max_length, or look at the examples that were reported as masked.",
        )
    total = 0.0
    for batch, count in zip(micro_batches, counts, strict=True):
        if not count:
            continue
        loss = label_token_loss(model, batch) / sum(counts)
        total += loss.item()
        if not math.isfinite(total):
            raise _not_finite("The training loss", where)
        loss.backward()  # type: ignore[no-untyped-call]
    return total


def _not_finite(what: str, where: str) -> TrainingError:
    return TrainingError(
        f"{what} is not finite ({where})",
        cause="Most often the learning rate is too high; or a weight of the model is not finite.",
        remedy="Lower train.learning_rate, or set train.max_grad_norm: 1.0.",
    )


class _BlockAdamW:
    """AdamW over one block, its moments and its fp32 master in flat vectors.

    Args:
        replica: A replica whose block is active.
        block_index: That block.
        arguments: Optimizer arguments.
        moments: State to go on from, or None.
    """

    def __init__(
        self, replica: Replica, block_index: int, arguments: LocalArguments, moments: Moments | None
    ) -> None:
        parameters = replica.parameters(block_index)
        self._buffer = replica.buffer(block_index)
        self._max_grad_norm = arguments.max_grad_norm
        self._hooks: list[Any] = []
        self._gradient: Tensor | None = None
        self._stepped: Sequence[Tensor] = parameters
        self._flat = self._buffer
        if self._buffer.dtype != torch.float32:
            self._flat = self._buffer.float()
            self._stepped = _views(self._flat, parameters)
            self._gradient = torch.zeros_like(self._flat)
            for parameter, weight, gradient in zip(
                parameters, self._stepped, _views(self._gradient, parameters), strict=True
            ):
                weight.grad = gradient
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_move_to(gradient)))
        zeros = moments is None
        self._exp_avg = torch.zeros_like(self._flat)
