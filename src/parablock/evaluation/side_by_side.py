"""Evaluation of a model, or of the base model and the tuned one of a run side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from parablock.config.keys import RunConfig
from parablock.config.load import load_config
from parablock.data.formats import check_rows
from parablock.data.prompts import Example, Tokenized, tokenize_rows
from parablock.data.sources import Row, load_rows, renamed_as_in_run
from parablock.errors import DataError, ModelError
from parablock.evaluation.choices import multiple_choice
from parablock.evaluation.generation import answers_match, describe_cut, rouge_l, score_answers
from parablock.evaluation.instructions import IDS_FIELD, score_instructions, with_references
from parablock.evaluation.scoring import Sample, context_length, evaluate_losses, sample_examples
from parablock.model.pretrained import LoadedModel, load_model, load_tokenizer
from parablock.model.save import model_sha256
from parablock.storage.run_directory import RunDirectory

JUDGES: dict[str, Callable[[str, str], float]] = {"exact_match": answers_match, "rouge_l": rouge_l}
"""Tasks for which a model answers → the value of (answer, reference)."""
INSTRUCTIONS = "ifeval"
TASKS = ("loss", *JUDGES, "multiple_choice", INSTRUCTIONS)


@dataclass(frozen=True)
class Score:
    """A loss in nats per token, or the mean value of answers (0 … 1), of one model (base | tuned | model).

    Attributes:
        label: base | tuned | model.
        name_or_path: The model.
        value: The score.
        count: The number of examples.
        samples: The first few examples.
        examples: All examples, in the order of the rows.
        values: The score of each example.
        predictions: What the model said, for each example; empty for a loss.
        followed: Whether each instruction of each example is followed, in the order of its row; of `ifeval` alone.
        tokenized: The rows as the model has read them, with those that could not be scored.
        cut: What `describe_cut` says of the prompts.
    """

    label: str
    name_or_path: str
    value: float
    count: int
    samples: tuple[Sample, ...] = ()
    examples: tuple[Example, ...] = ()
    values: tuple[float, ...] = ()
    predictions: tuple[str, ...] = ()
    followed: tuple[tuple[bool, ...], ...] = ()
    tokenized: Tokenized | None = None
    cut: str = ""

    @property
    def instruction_accuracy(self) -> float | None:
        """The share of all instructions that are followed, each by itself; None of other tasks."""
        each = [is_followed for of_example in self.followed for is_followed in of_example]
        return sum(each) / len(each) if each else None


def check_task(task: str) -> None:
    """Raise a DataError unless there is such a task, and what it needs is installed."""
    if task not in TASKS:
        raise DataError(f"there is no task {task!r}", remedy=f"Choose one of {', '.join(TASKS)}.")
    if task in JUDGES:
        JUDGES[task]("", "")  # a judge that lacks its package says so now, and not after the answers


def score_models(
    model_or_run_dir: str,
    sources: Sequence[str],
    *,
    task: str = "loss",
    max_examples: int | None = None,
    max_new_tokens: int = 256,
    data_format: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: RunConfig | None = None,
    device: str = "auto",
    rows: Sequence[Row] | None = None,
    tokenizer_of: str | None = None,
    stage: Callable[[str, int | None], None] = lambda *_: None,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Score a model, or both models of a finished run, on rows.

    Where a model answers, rows are never cut, whatever the run's `max_length`: nothing of them is learnt. A prompt
    that the context does not hold loses its beginning, and a score says so.

    Args:
        model_or_run_dir: A Hugging Face folder or id, or a run directory.
        sources: Files or `datasets` names.
        task: One of `TASKS`.
        max_examples: Number of rows, from the start; None: all, or, of held-out rows, as many as the run scored.
        max_new_tokens: Longest answer, in tokens.
        data_format: A value of `data.format`; None: the run's format, or `auto` without a run.
        columns: As `data.columns`; None: those of the run, for rows that have them all.
        config: The run whose truncation and loss mask apply; None: the run of `model_or_run_dir`. Without a run,
            the model's context limits the length, and only completions count.
        device: auto | cpu | cuda.
        rows: The held-out rows of the run, in place of sources.
        tokenizer_of: The folder whose tokenizer and chat template write the rows; None: the model's, or, for both
            models of a run, the tuned one's.
        stage: Called with (name, number of examples) of each step that can take long.
        on_done: Called with the number of examples of the step that are done.

    Raises:
        InputError: A model or a file is missing or broken, or the rows do not fit the task.
    """
    check_task(task)
    config = config or _read_config(model_or_run_dir)
    is_held_out = rows is not None and config is not None
    if rows is None:
        read_as = data_format or (config.data.format if config else "auto")

        def named(row: Row) -> Row:
            return renamed_as_in_run(row, of_run, lambda row: check_rows([row], read_as))

        def check(found: Sequence[Row]) -> None:
            if task != INSTRUCTIONS:  # whose rows get their references below
                check_rows([named(row) for row in found[:max_examples]], read_as)

        of_run = config.data.columns if config and columns is None and task != INSTRUCTIONS else {}
        read = partial(load_rows, split="test", columns=columns, check=check)
        rows = [named(row) for source in sources for row in read(source)]
    rows = rows[:max_examples]
    if task == INSTRUCTIONS:
        rows = with_references(rows)
    answers = task == INSTRUCTIONS or task in JUDGES
    models = models_of(model_or_run_dir)
    tokenizer = load_tokenizer(tokenizer_of or models[-1][1])  # whose template the rows of training had
    scores = []
    for label, name_or_path, dtype in models:
        stage(f"loading the {label} model" if label != "model" else "loading the model", None)
        loaded = load_model(name_or_path, dtype=dtype, device=device, init="pretrained", seed=0)
        loaded = replace(loaded, tokenizer=tokenizer)
        tokenized = tokenize_rows(
            rows,
            tokenizer,
            data_format=data_format or (config.data.format if config else "auto"),
            max_length=sys.maxsize if answers else config.data.max_length if config else _longest(loaded),
            completion_only_loss=config.train.completion_only_loss if config else True,
            date=config.data.date if config else None,
        )
        if is_held_out and max_examples is None:
            assert config is not None
            drawn = sample_examples(tokenized.examples, config.evaluation.max_examples, config.seed)
            tokenized = replace(tokenized, examples=drawn)
        count = None if task == "multiple_choice" else len(tokenized.examples)
        stage(f"{label}: {task} on {len(tokenized.examples)} examples", count)
        cut = describe_cut(loaded.model, tokenized.examples, max_new_tokens) if answers else ""
        score = _score(label, loaded, tokenized, task, max_new_tokens, on_done)
        scores.append(replace(score, tokenized=tokenized, cut=cut))
    return scores


def _score(
    label: str,
    loaded: LoadedModel,
    tokenized: Tokenized,
    task: str,
    max_new_tokens: int,
    on_done: Callable[[int], None],
) -> Score:
    model, tokenizer, name, examples = loaded.model, loaded.tokenizer, loaded.name_or_path, tokenized.examples
    followed: tuple[tuple[bool, ...], ...] = ()
    if task == "loss":
        loss, values = evaluate_losses(model, examples, pad_token_id=tokenizer.pad_token_id, on_done=on_done)
        return Score(label, name, loss, len(examples), examples=examples, values=values)
    if task in JUDGES:
        result = score_answers(
            model, tokenizer, examples, judge=JUDGES[task], max_new_tokens=max_new_tokens, on_done=on_done
        )
    elif task == INSTRUCTIONS:
        result, followed = score_instructions(
            model, tokenizer, examples, max_new_tokens=max_new_tokens, on_done=on_done
        )
    else:
        result = multiple_choice(model, tokenizer, tokenized)
    said = (result.samples, examples, result.values, result.predictions, followed)
    return Score(label, name, result.score, result.count, *said)


def scores_by_client(scores: Sequence[Score], owners: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a record for each client whose rows were scored: their number, and the score of each model on them.

    A loss is the mean over the tokens of a client's rows, as it is over those of all rows.

    Args:
        scores: At least one.
        owners: The place of a row → whose it was.
    """
    records = []
    places = [example.row.place for example in scores[0].examples]
    for client_id in sorted(set(owners.values())):
        own = [n for n, place in enumerate(places) if owners.get(place) == client_id]
        weights = [scores[0].examples[n].num_target_tokens if not scores[0].predictions else 1 for n in own]
        if own:
            means = {
                score.label: sum(score.values[n] * weight for n, weight in zip(own, weights, strict=True))
                / sum(weights)
                for score in scores
            }
            records.append({"client": client_id, "examples": len(own), **means})
    return records


def score_records(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return a record for each example: its place, prompt and reference, and the outcome of each model."""
    records = []
    for n, example in enumerate(scores[0].examples):
        record: dict[str, Any] = {"row": example.row.place, "reference": example.completion}
        for score in scores:
            if score.predictions:
                record[score.label] = score.predictions[n]
            record[f"{score.label}_score"] = score.values[n]
            if score.followed:
                names = example.row.fields[IDS_FIELD]
                record[f"{score.label}_followed"] = [
                    name for name, is_followed in zip(names, score.followed[n], strict=True) if is_followed
                ]
        records.append(record)
    return records


def models_of(model_or_run_dir: str) -> list[tuple[str, str, str]]:
    """List (label, name or path, dtype) of a model, or of both models of a finished run.

    Raises:
        ModelError: The run has no model yet, or one for each client.
    """
    directory, config = RunDirectory(model_or_run_dir), _read_config(model_or_run_dir)
    if config is None:
        return [("model", model_or_run_dir, "float32")]
    directory.check_has_model()
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


def changed_weights(model_or_run_dir: str) -> str | None:
    """Say that the weights of a run are not those that it has written; "" if they are, None if nothing tells."""
    directory = RunDirectory(model_or_run_dir)
    there = directory.config.exists() and directory.summary.exists()
    wanted = directory.read_summary().get("model_sha256") if there else None
    if wanted is None or not any(directory.model.glob("*.safetensors")):
        return None
    if model_sha256(directory.model) == wanted:
        return ""
    return (
        f"the weights in {directory.model} are not those that the run has written: their hash is another one "
        "than that in summary.json"
    )


def rounded_after(model_or_run_dir: str) -> str | None:
    """Return the precision to which a run rounded its weights after its own scores; None if it did not."""
    config = _read_config(model_or_run_dir)
    written = RunDirectory(model_or_run_dir).model / "config.json"
    if config is None or not written.exists():
        return None
    precision = json.loads(written.read_text(encoding="utf-8")).get("dtype")
    return precision if precision not in (None, config.model.dtype) else None


def day_of(model_or_run_dir: str) -> str | None:
    """Return the day that a run's chat template writes; None without a run, or without such a template."""
    config = _read_config(model_or_run_dir)
    return config.data.date if config else None


def _read_config(model_or_run_dir: str) -> RunConfig | None:
    written = RunDirectory(model_or_run_dir).config
    return load_config(written) if written.exists() else None


def _longest(loaded: LoadedModel) -> int:
    return min(context_length(loaded.model) or 2048, 2048)
