"""Scores of a model on each T0 family apart: its loss, and its share of right answers.

Where the training rows of a template have two to sixteen different completions, these are the choices of its rows,
and a family with such templates is scored by multiple choice on their rows. Any other family has to write its
answers, and they are compared with the references.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from _record import t0

from parablock.evaluation.choices import MAX_GROUP_CHOICES
from parablock.evaluation.side_by_side import score_models

ANSWER_TOKENS = 32


@cache
def family_scores(model: str, max_examples: int, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Score a model on the first held-out rows of each family; rows with choices are written to the folder."""
    material, scores = t0(), {}
    for train, test in zip(map(Path, material.train), map(Path, material.test), strict=True):
        family = test.name.removesuffix(".test.jsonl")
        (loss,) = score_models(model, [str(test)], max_examples=max_examples, device="cpu")
        path, task = folder / test.name, "multiple_choice"
        if not write_choices(train, test, path):
            path, task = test, "exact_match"
        (right,) = score_models(
            model, [str(path)], task=task, max_examples=max_examples, max_new_tokens=ANSWER_TOKENS, device="cpu"
        )
        scores[family] = {
            name: {"value": score.value, "rows": score.count} for name, score in (("loss", loss), (task, right))
        }
    return scores


def write_choices(train: Path, test: Path, path: Path) -> int:
    """Write the held-out rows that have a few answers to choose from, and tell how many they are."""
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows_of(train):
        answers[row["template"]].add(row["completion"].strip())
    chosen = [
        row | {"choices": sorted(answers[row["template"]])}
        for row in rows_of(test)
        if 2 <= len(answers[row["template"]]) <= MAX_GROUP_CHOICES
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in chosen), encoding="utf-8")
    return len(chosen)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
