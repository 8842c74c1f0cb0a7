"""Evaluation of a model, or of the base model and the tuned one of a run side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parablock.config.keys import RunConfig
from parablock.config.load import load_config
from parablock.data.prompts import Tokenized, tokenize_rows
from parablock.data.sources import load_rows
from parablock.errors import DataError, ModelError
from parablock.evaluation.choices import multiple_choice
from parablock.evaluation.generation import exact_match
from parablock.evaluation.scoring import Sample, context_length, evaluate_loss
from parablock.model.pretrained import LoadedModel, load_model
from parablock.storage.run_directory import RunDirectory

TASKS = ("loss", "exact_match", "multiple_choice")


@dataclass(frozen=True)
class Score:
    """A loss in nats per token, or the share of right answers, of one model (base | tuned | model)."""

    label: str
    name_or_path: str
    value: float
    count: int
    samples: tuple[Sample, ...] = ()


def score_models(
    model_or_run_dir: str,
    sources: Sequence[str],
    *,
    task: str = "loss",
    max_examples: int | None = None,
    max_new_tokens: int = 256,
    data_format: str | None = None,
    config: RunConfig | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> list[Score]:
    """Score a model, or both models of a finished run, on rows.

    Args:
        model_or_run_dir: A Hugging Face folder or id, or a run directory.
        sources: Files or `datasets` names.
        task: loss | exact_match | multiple_choice.
        max_examples: Number of rows, from the start; None: all.
        max_new_tokens: Longest answer of exact_match.
        data_format: A value of `data.format`; None: the run's format, or `auto` without a run.
        config: The run whose truncation and loss mask apply; None: the run of `model_or_run_dir`. Without a run,
            the model's context limits the length, and only completions count.
        device: auto | cpu | cuda.
        tell: Called with messages about the progress.

    Raises:
        InputError: A model or a file is missing or broken, or the rows do not fit the task.
    """
    if task not in TASKS:
        raise DataError(f"there is no task {task!r}", remedy=f"Choose one of {', '.join(TASKS)}.")
    config = config or _read_config(model_or_run_dir)
    rows = [row for source in sources for row in load_rows(source, split="test")][:max_examples]
    scores = []
    for label, name_or_path, dtype in models_of(model_or_run_dir):
        tell(f"{label}: {task} of {name_or_path} on {len(rows)} examples")
        loaded = load_model(name_or_path, dtype=dtype, device=device, init="pretrained", seed=0)
        tokenized = tokenize_rows(
            rows,
            loaded.tokenizer,
            data_format=data_format or (config.data.format if config else "auto"),
            max_length=config.data.max_length if config else _longest(loaded),
            completion_only_loss=config.train.completion_only_loss if config else True,
        )
        scores.append(_score(label, loaded, tokenized, task, max_new_tokens))
    return scores


def _score(label: str, loaded: LoadedModel, tokenized: Tokenized, task: str, max_new_tokens: int) -> Score:
    model, tokenizer, name = loaded.model, loaded.tokenizer, loaded.name_or_path
    if task == "loss":
        loss = evaluate_loss(model, tokenized.examples, pad_token_id=tokenizer.pad_token_id)
        return Score(label, name, loss, len(tokenized.examples))
    if task == "exact_match":
        result = exact_match(model, tokenizer, tokenized.examples, max_new_tokens=max_new_tokens)
    else:
        result = multiple_choice(model, tokenizer, tokenized)
    return Score(label, name, result.score, result.count, result.samples)


def models_of(model_or_run_dir: str) -> list[tuple[str, str, str]]:
    """List (label, name or path, dtype) of a model, or of both models of a finished run.

    Raises:
        ModelError: The run has no model yet, or one for each client.
    """
    directory, config = RunDirectory(model_or_run_dir), _read_config(model_or_run_dir)
    if config is None:
        return [("model", model_or_run_dir, "float32")]
    if not directory.model.is_dir():
        raise ModelError(
            f"the run in {directory.path} has no model yet",
            cause="It was interrupted, or it failed.",
            remedy=f"Finish it with: parablock resume {directory.path}",
        )
    own = sorted(directory.model.glob("client_*"))
    if own:
        raise ModelError(
            f"the run in {directory.path} has a model for each of {len(own)} clients",
            cause="Its method is local: the clients share nothing.",
            remedy=f"Give one of them, such as {own[0]}.",
        )
    base = config.model
    if base.init == "random":
        return [("tuned", str(directory.model), base.dtype)]
    return [("base", base.name_or_path, base.dtype), ("tuned", str(directory.model), base.dtype)]


def _read_config(model_or_run_dir: str) -> RunConfig | None:
    written = RunDirectory(model_or_run_dir).config
    return load_config(written) if written.exists() else None


def _longest(loaded: LoadedModel) -> int:
    return min(context_length(loaded.model) or 2048, 2048)
