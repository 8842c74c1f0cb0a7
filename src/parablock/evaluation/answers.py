"""Answers of the base model and of the tuned one to a few test prompts, for people to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from parablock.data.formats import read_conversation
from parablock.data.prompts import Example, detect_format
from parablock.evaluation.generation import generate_completions
from parablock.evaluation.scoring import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHORTEST_LIMIT, LONGEST_LIMIT = 48, 192
"""The tokens of an answer are limited to a quarter more than the longest reference has, within these bounds."""

MAX_OPENING = 32
"""Most tokens of a plain text that a model is to go on with."""


def choose_prompts(examples: Sequence[Example], count: int) -> tuple[Example, ...]:
    """Return the first examples whose prompts differ; of a plain text, its first third is the prompt."""
    chosen: dict[tuple[int, ...], Example] = {}
    for example in examples:
        if len(chosen) == count:
            break
        if len(example.prompt_ids) < 2 and len(example.input_ids) > 3:
            opening = example.input_ids[: min(MAX_OPENING, len(example.input_ids) // 3)]
            example = replace(example, prompt_ids=opening)
        if example.prompt_ids:
            chosen.setdefault(example.prompt_ids, example)
    return tuple(chosen.values())


def most_tokens(model: PreTrainedModel, examples: Sequence[Example]) -> int:
    """Return the most tokens of an answer: as the references need, or half of the context of a small model."""
    wanted = max((example.num_target_tokens * 5 // 4 for example in examples), default=0)
    length = min(LONGEST_LIMIT, max(SHORTEST_LIMIT, wanted))
    limit = context_length(model)
    return length if limit is None else max(1, min(length, limit // 2))


def answer_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    on_token: Callable[[int], None] | None = None,
) -> list[tuple[str, int | None]]:
    """Answer prompts by greedy search; return each answer, and the tokens at which it was cut, if it was."""
    length, cut = most_tokens(model, examples), set[int]()
    answers = generate_completions(
        model, tokenizer, examples, max_new_tokens=length, on_token=on_token, on_endless=cut.add
    )
    return [(answer, length if n in cut else None) for n, answer in enumerate(answers)]


def describe_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data_format: str
) -> list[dict[str, Any]]:
    """Return the prompt and the reference of each example as text."""
    return [
        {"prompt": _prompt_of(example, tokenizer, data_format), "reference": example.completion}
        for example in examples
    ]


def _prompt_of(example: Example, tokenizer: PreTrainedTokenizerBase, data_format: str) -> str:
    """Return what the user says last before the answer, without the template around it."""
    data_format = detect_format([example.row]) if data_format == "auto" else data_format
    if data_format == "text":
        text: str = tokenizer.decode(example.prompt_ids, skip_special_tokens=True)
        return text
    turns = read_conversation(example.row, data_format).turns
    last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    asked = [turn["content"] for turn in turns[:last] if turn["role"] != "assistant"]
    return str(asked[-1]) if asked else ""
