"""The loss on held-out examples: what a run reports as `eval_loss`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from parablock.data.prompts import Example
from parablock.errors import DataError
from parablock.evaluation.scoring import score_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_loss(
    model: PreTrainedModel, examples: Sequence[Example], *, pad_token_id: int, batch_size: int = 16
) -> float:
    """Compute the mean cross-entropy over all labelled tokens of all examples.

    Every token weighs the same, so a long completion weighs more than a short one, as in training on them
    all at once. The order of the examples changes no bit of the result.

    Args:
        model: A causal language model; modules in training mode are in it again afterwards.
        examples: What it is evaluated on; tokens with a masked label count as context only.
        pad_token_id: The id that fills a batch.
        batch_size: Examples that go through the model at once; a matter of memory and speed.

    Returns:
        Nats per token, computed in float32; not finite if the model's numbers are not.

    Raises:
        DataError: If no example has a labelled token.
    """
    likelihoods = score_examples(model, examples, pad_token_id=pad_token_id, batch_size=batch_size)
    num_tokens = sum(likelihood.num_tokens for likelihood in likelihoods)
    if num_tokens == 0:
        raise DataError(
            f"None of {len(examples)} examples to evaluate on has a token that the loss counts.",
            remedy="Give test data with completions, or raise data.max_length if the prompts fill it.",
        )
    return -math.fsum(likelihood.log_prob for likelihood in likelihoods) / num_tokens
