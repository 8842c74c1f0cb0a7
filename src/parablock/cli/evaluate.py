"""`parablock eval`: score the base model and the tuned one side by side."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parablock.cli.output import say
from parablock.cli.show_data import columns_of
from parablock.cli.terminal import LOADING, check_model, console, show_work
from parablock.cli.word_table import WordTable
from parablock.printable import as_argument, printable

if TYPE_CHECKING:
    from parablock.evaluation.side_by_side import Score


def evaluate(
    model_or_run_dir: Annotated[str, typer.Argument(help="A Hugging Face folder or id, or a run directory.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help="A file or a `datasets` name; repeatable. Default: the rows that the run held out."
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="loss, exact_match, rouge_l, multiple_choice or ifeval.")] = "loss",
    max_examples: Annotated[int | None, typer.Option(min=1, help="Score only the first examples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    data_format: Annotated[
        str | None,
        typer.Option("--format", help="How a row becomes an example; default: as in the run."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="field=column, as data.columns; default: as in the run. Repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, max=3, help="Answers to show.")] = 1,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="A folder for scores and predictions; default: the folder `evaluation` of the run."),
    ] = None,
    per_client: Annotated[
        bool, typer.Option("--per-client", help="Also score the held-out rows of each client by themselves.")
    ] = False,
    harness: Annotated[str, typer.Option(help="Instead of --data: tasks of lm-evaluation-harness.")] = "",
    tasks_dir: Annotated[Path | None, typer.Option(help="A folder with task files of the harness.")] = None,
) -> None:
    """Score the base model and the tuned one side by side, on the rows that the run held out or on others.

    TASK.json has the scores, TASK.jsonl a line for each row: its place, reference, prediction and score.

    `ifeval` checks answers by the instructions of rows that have `instruction_id_list` and `kwargs`, as IFEval has.

    Example: parablock eval runs/t0 --task exact_match

    Example: parablock eval runs/t0 --task ifeval --data ifeval.jsonl --max-new-tokens 1280
    """
    if harness:
        given = {"--data": data, "--column": columns, "--format": data_format, "--per-client": per_client}
        if idle := [option for option, value in given.items() if value]:
            raise typer.BadParameter(f"--harness has rows of its own; leave {', '.join(idle)} out")
        _evaluate_by_harness(model_or_run_dir, harness, tasks_dir, max_examples)
        return
    with show_work() as progress:
        from parablock.data.sources import check_places

        named = columns_of(columns)
        if named and not data:
            raise typer.BadParameter("--column is for the rows of --data; leave it out")
        check_model(model_or_run_dir)
        check_places(data or [], split="test")
        folder = _folder_of(model_or_run_dir, output_dir)
        progress.stage(LOADING, is_brief=True)
        from parablock.errors import InputError
        from parablock.evaluation.side_by_side import (
            changed_weights,
            rounded_after,
            score_models,
            scores_by_client,
        )
        from parablock.experiment.held_out import is_run, rows_of_run

        of_run = is_run(model_or_run_dir)
        if not data and not of_run:
            raise typer.BadParameter("give --data, or a run directory, whose held-out rows are scored")
        rows, read, owners = None, None, dict[str, int]()
        try:
            if of_run:
                read = rows_of_run(model_or_run_dir)
                rows = None if data else read.held_out
                owners = {row.place: owner for row, owner in zip(read.held_out, read.owners, strict=False)}
        except InputError:  # rows that are given need none of the run's
            if not data:
                raise
        if per_client and (data or not owners):
            others = "--data" if data else "its data.test, which belong to none of them"
            raise typer.BadParameter(
                f"--per-client is for rows that a run held out of its clients' rows, not for those of {others}; "
                "leave it out"
            )
        if per_client and max_examples:
            raise typer.BadParameter("--per-client scores the rows of every client; leave --max-examples out")
        progress.stage("comparing the weights with the record of the run", is_brief=True)
        changed = changed_weights(model_or_run_dir)
        scores = score_models(
            model_or_run_dir,
            data or [],
            task=task,
            max_examples=max_examples,
            max_new_tokens=max_new_tokens,
            data_format=data_format,
            columns=named if columns else None,
            rows=rows,
            stage=progress.stage,
            on_done=progress.done,
        )
    scored = [example.row for example in scores[0].examples]
    num_trained = None if read is None else read.trained_on(scored, data_format)
    clients = scores_by_client(scores, owners) if per_client else []
    _show(scores, task, samples, is_held_out=rows is not None)
    for line in _left_out(scores):
        say(line)
    if clients:
        _show_clients(clients, task)
    if task == "loss" and not data and (rounded := rounded_after(model_or_run_dir)):
        say(f"note: the run scored before its weights were rounded to {rounded}, so its own loss differs a little")
    if changed:
        say(f"warning: {changed}")
    if num_trained:
        told = f"warning: {num_trained} of {len(scored)} rows were trained on"
        say(f"{told}: their scores say nothing of new rows")
    elif of_run and num_trained is None:
        say("note: whether rows were trained on is not known: the data of the run are not here as they were")
    if folder is not None:
        skipped = scores[-1].tokenized.skipped if scores[-1].tokenized else ()
        left_out = [{"row": entry.row.place, "reason": entry.reason} for entry in skipped]
        facts = {
            "rows_trained_on": num_trained,
            "data": data or "held-out rows of the run",
            "rows_left_out": left_out,
            "weights_changed": bool(changed),
        }
        _write(folder, task, scores, facts | ({"clients": clients} if clients else {}))
    if of_run:
        say(f"talk to it: parablock chat {as_argument(model_or_run_dir)}")


def _folder_of(model_or_run_dir: str, output_dir: Path | None) -> Path | None:
    """Return where the scores are written, which is possible; None: nowhere."""
    from parablock.storage.files import check_writable
    from parablock.storage.run_directory import RunDirectory

    if output_dir is None and not RunDirectory(model_or_run_dir).config.exists():
        return None
    folder = output_dir or Path(model_or_run_dir) / "evaluation"
    check_writable(folder)
    return folder


def _show(scores: list[Score], task: str, samples: int, *, is_held_out: bool) -> None:
    table = WordTable("", task, "examples", "model")
    for score in scores:
        table.add_row(score.label, f"{score.value:.4f}", str(score.count), score.name_or_path)
    if is_held_out:
        table.caption = "on rows that the run held out"
    console.print(table)
    for score in scores:
        if (accuracy := score.instruction_accuracy) is not None:
            say(f"{score.label}: {accuracy:.4f} of all instructions are followed, each by itself")
    for score in scores:
        for answer in score.samples[:samples]:
            wanted = "asked for" if score.followed else "right"
            console.print_as_it_is(
                f"{score.label} answers:\n{indent(printable(answer.prediction.strip()), '    ')}"
            )
            console.print_as_it_is(f"  {wanted} would be:\n{indent(printable(answer.reference.strip()), '    ')}")


def _left_out(scores: list[Score]) -> list[str]:
    """Say which rows, and what of rows and prompts, the scores do not count."""
    from parablock.experiment.data_notes import describe_skipped, describe_unused

    read = scores[-1].tokenized
    assert read is not None
    cut = [f"{score.label}: {score.cut}" for score in scores if score.cut]
    number = [f"warning: {len(read.skipped)} rows are not scored"] if len(read.skipped) > 1 else []
    return [*number, *describe_skipped([read], "not scored"), *describe_unused([read]), *cut]


def _show_clients(clients: list[dict[str, Any]], task: str) -> None:
    labels = [key for key in clients[0] if key not in ("client", "examples")]
    table = WordTable("client", "examples", *(f"{task}, {label}" for label in labels))
    for record in clients:
        values = (f"{record[label]:.4f}" for label in labels)
        table.add_row(str(record["client"]), str(record["examples"]), *values)
    console.print(table)


def _write(folder: Path, task: str, scores: list[Score], facts: dict[str, Any]) -> None:
    from parablock.evaluation.side_by_side import score_records
    from parablock.storage.files import new_folders, storage, write_atomically

    summary = {
        "task": task,
        **facts,
        "scores": [
            {"label": score.label, "model": score.name_or_path, "value": score.value, "examples": score.count}
            | ({} if score.instruction_accuracy is None else {"instruction_accuracy": score.instruction_accuracy})
            | ({"prompts_cut": score.cut} if score.cut else {})
            for score in scores
        ],
    }
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in score_records(scores))
    place = " (in place of earlier ones)" if (folder / f"{task}.json").exists() else ""
    with storage(folder), new_folders(folder):
        write_atomically(folder / f"{task}.jsonl", "".join(lines))
        write_atomically(folder / f"{task}.json", json.dumps(summary, indent=2) + "\n")
    say(f"scores{place}: {folder / task}.json   every row: {folder / task}.jsonl")


def _evaluate_by_harness(
    model_or_run_dir: str, tasks: str, tasks_dir: Path | None, max_examples: int | None
) -> None:
    with show_work() as progress:
        check_model(model_or_run_dir)
        progress.stage(LOADING, is_brief=True)
        from parablock.evaluation.harness import score_with_harness

        scores = score_with_harness(
            model_or_run_dir,
            [task.strip() for task in tasks.split(",")],
            tasks_dir=tasks_dir,
            max_examples=max_examples,
            tell=progress.stage,
        )
    table = WordTable("", "task", "metric", "value", "examples", "model")
    for score in scores:
        facts = (score.label, score.task, score.metric, f"{score.value:.4f}", str(score.count), score.name_or_path)
        table.add_row(*facts)
    console.print(table)
