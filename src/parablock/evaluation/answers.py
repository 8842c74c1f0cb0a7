"""Answers of the base model and of the tuned one to a few test prompts, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from parablock.data.formats import read_conversation
from parablock.data.prompts import Example, detect_format
from parablock.evaluation.generation import generate_completions
from parablock.evaluation.scoring import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 48
"""Longest answer, in tokens."""

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


def answer_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[str]:
    """Answer prompts by greedy search, in `MAX_NEW_TOKENS` tokens, or half of the context of a small model."""
    limit = context_length(model)
    length = MAX_NEW_TOKENS if limit is None else max(1, min(MAX_NEW_TOKENS, limit // 2))
    return generate_completions(model, tokenizer, examples, max_new_tokens=length)


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
