"""Evaluation by lm-evaluation-harness: scores of the base model and the tuned one on public tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.errors import DataError
from parablock.evaluation.side_by_side import models_of
from parablock.model.pretrained import load_model


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task for one model (base | tuned | model).

    A metric has the name of its filter if it has one: `exact_match,flexible-extract`.
    """

    label: str
    name_or_path: str
    task: str
    metric: str
    value: float
    count: int


def score_with_harness(
    model_or_run_dir: str,
    tasks: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    max_examples: int | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> list[HarnessScore]:
    """Run tasks of the harness on a model, or on both models of a finished run.

    Args:
        model_or_run_dir: A Hugging Face folder or id, or a run directory.
        tasks: Names of tasks or groups.
        tasks_dir: A folder with task files (YAML) that replace the harness's own; needs no network.
        max_examples: Number of examples of each task, from its start; None: all.
        device: auto | cpu | cuda.
        tell: Called with messages about the progress.

    Raises:
        InputError: The harness is not installed, or a model, a task or its data is missing or broken.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise DataError(
            "tasks of the harness need the package lm-eval, which is not installed",
            remedy="Install it: pip install 'parablock[eval]'",
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise DataError(f"there is no folder {tasks_dir}", remedy="Give a folder with task files (YAML).")
    manager = TaskManager(
        include_path=None if tasks_dir is None else str(tasks_dir), include_defaults=tasks_dir is None
    )
    scores: list[HarnessScore] = []
    for label, name_or_path, dtype in models_of(model_or_run_dir):
        tell(f"{label}: {', '.join(tasks)} on {name_or_path}")
        loaded = load_model(name_or_path, dtype=dtype, device=device, init="pretrained", seed=0)
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=16),
                tasks=list(tasks),
                task_manager=manager,
                limit=max_examples,
                bootstrap_iters=0,
                random_seed=None,  # nothing outside the harness is seeded
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except (KeyError, ValueError, OSError) as error:
            raise DataError(
                f"the harness cannot run {', '.join(tasks)}: {' '.join(str(error).split())}",
                cause="The harness has no such task, or the data of the task cannot be read.",
                remedy="`lm-eval ls tasks` lists its tasks; --tasks-dir names a folder with your own.",
            ) from error
        scores += _read_scores(label, name_or_path, found)
    return scores


def _read_scores(label: str, name_or_path: str, found: Mapping[str, Any]) -> Iterator[HarnessScore]:
    for task, values in found["results"].items():
        count = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for metric, value in values.items():
            if "," in metric and "_stderr" not in metric and isinstance(value, int | float):
                name = metric.removesuffix(",none")
                yield HarnessScore(label, name_or_path, task, name, float(value), count)
