"""Log-probabilities of labelled tokens, the loss, and the result type of all evaluation tasks.

Shapes: B examples of a batch, T tokens of the longest of them, N labelled tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from parablock.data.batches import collate
from parablock.data.prompts import IGNORED_LABEL, Example
from parablock.errors import DataError
from parablock.seeding import generator_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The sum of the natural logarithms of the labelled tokens' probabilities in one example, and their number."""

    log_prob: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored example, for people to read."""

    prompt: str
    reference: str
    prediction: str


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The share of right examples (0 … 1), their number, the first few of them, and each one's outcome.

    Attributes:
        score: The mean of `values`.
        count: The number of examples.
        samples: The first few examples.
        predictions: What the model said, for each example.
        values: The value of each example: 1 where it is right and 0 where it is wrong, or a part of that.
    """

    score: float
    count: int
    samples: tuple[Sample, ...]
    predictions: tuple[str, ...] = ()
    values: tuple[float, ...] = ()


def first_samples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], predictions: Sequence[str], count: int
) -> tuple[Sample, ...]:
    """Return the first few examples with their predictions."""
    return tuple(
        Sample(tokenizer.decode(example.prompt_ids), example.completion, prediction)
        for example, prediction in zip(examples[:count], predictions, strict=False)
    )


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def context_length(model: PreTrainedModel) -> int | None:
    """Return the model's context length in tokens; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def score_examples(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    batch_size: int,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[Likelihood]:
    """Compute the likelihood of each example's labelled tokens, in float32 for every dtype of the model.

    Examples are sorted before they are cut into batches, by length first to save padding. So the result of an
    example does not depend on the given order or, except for rounding, on the batch size. The results are in the
    given order; the first token of an example is never predicted. `on_done` is called with the number of examples
    that are scored.
    """
    order = sorted(range(len(examples)), key=lambda index: _place_in_order(examples[index]))
    likelihoods: dict[int, Likelihood] = {}
    with evaluation_mode(model):
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            batch = [examples[index] for index in chosen]
            likelihoods.update(zip(chosen, _score_batch(model, batch, pad_token_id=pad_token_id), strict=True))
            on_done(len(likelihoods))
    return [likelihoods[index] for index in range(len(examples))]


def evaluate_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    batch_size: int = 16,
    on_done: Callable[[int], None] = lambda _: None,
) -> float:
    """Compute the mean cross-entropy over all labelled tokens of all examples: nats per token, in float32.

    Every token has the same weight, so a long completion counts more than a short one. The order of the examples
    has no effect on the result, not even by a bit. The result is not finite if the model's numbers are not.

    Raises:
        DataError: No example has a labelled token.
    """
    return evaluate_losses(model, examples, pad_token_id=pad_token_id, batch_size=batch_size, on_done=on_done)[0]


def evaluate_losses(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    batch_size: int = 16,
    on_done: Callable[[int], None] = lambda _: None,
) -> tuple[float, tuple[float, ...]]:
    """Compute the loss of all examples, as `evaluate_loss` does, and the loss of each."""
    likelihoods = score_examples(model, examples, pad_token_id=pad_token_id, batch_size=batch_size, on_done=on_done)
    num_tokens = sum(likelihood.num_tokens for likelihood in likelihoods)
    if num_tokens == 0:
        raise DataError(
            f"None of {len(examples)} examples to evaluate on has a token that the loss counts.",
            remedy="Give test data with completions, or raise data.max_length if the prompts fill it.",
        )
    total = -math.fsum(likelihood.log_prob for likelihood in likelihoods) / num_tokens
    return total, tuple(-likelihood.log_prob / max(1, likelihood.num_tokens) for likelihood in likelihoods)


def sample_examples(examples: tuple[Example, ...], max_examples: int, seed: int) -> tuple[Example, ...]:
    """Draw the examples that a run is scored on, every time the same."""
    if len(examples) <= max_examples:
        return examples
    drawn = generator_for(seed, "evaluation").choice(len(examples), size=max_examples, replace=False)
    return tuple(examples[k] for k in sorted(drawn.tolist()))


def _place_in_order(example: Example) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return len(example.input_ids), example.input_ids, example.labels


def _score_batch(model: PreTrainedModel, examples: Sequence[Example], *, pad_token_id: int) -> list[Likelihood]:
    batch = collate(examples, pad_token_id=pad_token_id)
    logits_BTV = model(
        input_ids=batch.input_ids_BT.to(model.device),
        attention_mask=batch.attention_mask_BT.to(model.device),
        use_cache=False,
    ).logits
    targets_BT = batch.labels_BT[:, 1:].to(model.device)  # the logits of one position predict the next token
    counted_BT = targets_BT != IGNORED_LABEL
    logits_NV = logits_BTV[:, :-1][counted_BT].float()
    log_probs_BT = torch.zeros(targets_BT.shape, dtype=torch.float64, device=model.device)
    log_probs_BT[counted_BT] = -functional.cross_entropy(
        logits_NV, targets_BT[counted_BT], reduction="none"
    ).double()
    pairs = zip(log_probs_BT.sum(dim=1).tolist(), counted_BT.sum(dim=1).tolist(), strict=True)
    return [Likelihood(log_prob, num_tokens) for log_prob, num_tokens in pairs]
