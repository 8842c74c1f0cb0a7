"""Multiple-choice accuracy: the model chooses the completion with the highest likelihood.

The score of a choice is the mean log-probability of its tokens, including those that end the turn. The mean does
not punish length, and the end of the turn tells a choice from a longer one that begins with it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from parablock.data.prompts import IGNORED_LABEL, Example, Tokenized, replace_completion, tokenize_rows
from parablock.data.sources import Row
from parablock.errors import DataError, TrainingError
from parablock.evaluation.scoring import TaskResult, context_length, first_samples, score_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHOICES_FIELD = "choices"
GROUP_FIELD = "template"
MAX_GROUP_CHOICES = 16


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Tokenized,
    *,
    batch_size: int = 16,
    num_samples: int = 3,
) -> TaskResult:
    """Compute the share of examples whose reference is the model's likeliest choice; see `find_choices`.

    A tie goes to the first choice. `batch_size` choices go through the model at once.

    Raises:
        DataError: The choices are missing or wrong, or one is too long for the model.
        TrainingError: A likelihood is not finite.
    """
    examples = tokenized.examples
    choices_of = find_choices(examples)
    candidates = _tokenize_choices(examples, choices_of, tokenizer, tokenized.data_format, context_length(model))
    likelihoods = score_examples(model, candidates, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
    scores = iter([likelihood.log_prob / likelihood.num_tokens for likelihood in likelihoods])
    predictions = [_likeliest(choices, [next(scores) for _ in choices]) for choices in choices_of]
    values = tuple(
        float(prediction == example.completion.strip())
        for prediction, example in zip(predictions, examples, strict=True)
    )
    samples = first_samples(tokenizer, examples, predictions, num_samples)
    return TaskResult(sum(values) / len(examples), len(examples), samples, tuple(predictions), values)


def find_choices(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Return the choices of each of at least one example.

    The field `choices` of a row is a list of texts, including the completion. Without it, the choices are the
    distinct completions of all examples with the same field `template` (or with none), in alphabetical order. White
    space around a choice does not count.

    Raises:
        DataError: `choices` is not such a list, or there are fewer than two distinct completions, or more than
            `MAX_GROUP_CHOICES`.
    """
    completions: dict[str, set[str]] = {}
    for example in examples:
        completions.setdefault(_group(example.row), set()).add(example.completion.strip())
    return [
        _read_choices(example)
        if example.row.fields.get(CHOICES_FIELD) is not None
        else _group_choices(example.row, completions[_group(example.row)])
        for example in examples
    ]


def _group(row: Row) -> str:
    return str(row.fields.get(GROUP_FIELD))


def _read_choices(example: Example) -> tuple[str, ...]:
    given, place = example.row.fields[CHOICES_FIELD], example.row.place
    remedy = f'Write them as a list of two or more texts, such as "{CHOICES_FIELD}": ["yes", "no"].'
    if not isinstance(given, list) or not all(isinstance(choice, str) and choice.strip() for choice in given):
        raise DataError(f"{place}: {CHOICES_FIELD} is not a list of texts: {given!r}.", remedy=remedy)
    choices = tuple(dict.fromkeys(choice.strip() for choice in given))
    if len(choices) < 2:
        raise DataError(f"{place}: {CHOICES_FIELD} has fewer than two distinct texts: {given!r}.", remedy=remedy)
    if example.completion.strip() not in choices:
        raise DataError(
            f"{place}: the completion {example.completion!r} is not among its {CHOICES_FIELD} {given!r}.",
            remedy="Add it to the list, with the same spelling.",
        )
    return choices


def _group_choices(row: Row, completions: set[str]) -> tuple[str, ...]:
    if not 2 <= len(completions) <= MAX_GROUP_CHOICES:
        name = row.fields.get(GROUP_FIELD)
        group = "the examples" if name is None else f"the examples of {GROUP_FIELD} {name!r}"
        raise DataError(
            f"{row.place} has no field {CHOICES_FIELD}, and {group} have {len(completions)} distinct completions.",
            cause=f"Completions serve as choices only where there are 2 to {MAX_GROUP_CHOICES} distinct ones.",
            remedy=f'Give each row a field {CHOICES_FIELD}, a list of texts such as ["yes", "no"] with the '
            "completion among them, or evaluate the loss or exact match instead.",
        )
    return tuple(sorted(completions))


def _tokenize_choices(
    examples: Sequence[Example],
    choices_of: Sequence[tuple[str, ...]],
    tokenizer: PreTrainedTokenizerBase,
    data_format: str,
    limit: int | None,
) -> list[Example]:
    rows = [
        replace_completion(example.row, choice, data_format=data_format)
        for example, choices in zip(examples, choices_of, strict=True)
        for choice in choices
    ]
    tokenized = tokenize_rows(
        rows, tokenizer, data_format=data_format, max_length=sys.maxsize, completion_only_loss=True
    )
    for skipped in tokenized.skipped:
        raise DataError(
            f"{skipped.row.place}: a choice cannot be scored, because {skipped.reason}.",
            remedy="Leave out the rows with such a completion.",
        )
    return [_mask_prompt(candidate, limit) for candidate in tokenized.examples]


def _mask_prompt(candidate: Example, limit: int | None) -> Example:
    """Mask all but the choice itself, and cut the prompt on the left to fit the model's context."""
    num_prompt = len(candidate.prompt_ids)
    labels = (IGNORED_LABEL,) * num_prompt + candidate.labels[num_prompt:]
    if limit is None or len(labels) <= limit:
        return dataclasses.replace(candidate, labels=labels)
    if len(labels) - num_prompt >= limit:
        raise DataError(
            f"{candidate.row.place}: a choice of {len(labels) - num_prompt} tokens leaves no room for its prompt "
            f"in the model's context of {limit}.",
            remedy="Leave the row out, or take a model with a longer context.",
        )
    return dataclasses.replace(candidate, input_ids=candidate.input_ids[-limit:], labels=labels[-limit:])


def _likeliest(choices: Sequence[str], scores: Sequence[float]) -> str:
    if not all(map(math.isfinite, scores)):
        raise TrainingError(
            f"The likelihood of a choice is not finite: {dict(zip(choices, scores, strict=True))}.",
            cause="The model's weights are not finite, or too large for its dtype.",
            remedy="Evaluate an earlier checkpoint, or train with a lower learning rate.",
        )
    return max(zip(scores, choices, strict=True), key=lambda pair: pair[0])[1]
