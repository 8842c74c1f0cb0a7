"""The commands of `parablock`.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 stopped by Ctrl-C with everything saved.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parablock import __version__
from parablock.cli.deploy import deploy
from parablock.cli.export_run import export
from parablock.cli.show_data import data
from parablock.cli.terminal import Overrides, console, exit_when_interrupted, print_summary, show_progress
from parablock.errors import ParaBlockError

app = typer.Typer(
    name="parablock",
    help="Federated fine-tuning of LLMs over slow links: one block at a time, communication under computation.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(deploy, name="deploy")
app.command()(data)
app.command()(export)

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file; see docs/configuration.md.")]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="A folder for the results; it must hold no run yet.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        console.print(f"parablock {__version__}", highlight=False)
        raise typer.Exit
    del debug  # read by `main`


@app.command()
def run(
    config: ConfigFile,
    output_dir: OutputDir,
    overrides: Overrides = None,
) -> None:
    """Run one federated fine-tuning.

    Example: parablock run configs/t0.yaml --output-dir runs/t0 --set federation.delay=0
    """
    from parablock.config.load import load_config

    settings = load_config(config, overrides or [])  # before torch is loaded, so that errors show at once
    from parablock.experiment.run import run as run_experiment

    with show_progress() as (progress, stop):
        summary = run_experiment(settings, output_dir, progress=progress, asked_to_stop=stop)
    print_summary(summary, output_dir)


@app.command()
def resume(directory: Annotated[Path, typer.Argument(help="The --output-dir of an earlier run.")]) -> None:
    """Continue a run from its newest checkpoint; the result is bitwise that of a run that never stopped.

    Example: parablock resume runs/t0
    """
    from parablock.config.load import load_config
    from parablock.storage.run_directory import RunDirectory

    config = RunDirectory(directory).config
    with show_progress() as (progress, stop):
        match load_config(config).engine.name if config.exists() else "inprocess":
            case "remote":
                from parablock.deploy.direct_local import resume_direct as go_on
            case "flower":
                from parablock.deploy.one_machine import resume_local as go_on
            case _:
                from parablock.experiment.run import resume as go_on
        summary = go_on(directory, progress=progress, asked_to_stop=stop)
    print_summary(summary, directory)


@app.command()
def blocks(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or id.")],
    layers_per_block: Annotated[int, typer.Option(help="Decoder layers in a block.")] = 1,
    split: Annotated[
        str, typer.Option(help="layer, or attention_mlp: attention and MLPs as separate blocks.")
    ] = "layer",
    include_embeddings: Annotated[bool, typer.Option(help="Make the embeddings a block.")] = False,
    include_head: Annotated[bool, typer.Option(help="Make the final norm and the head a block.")] = False,
    layers_path: Annotated[
        str | None, typer.Option(help="Path of the decoder layers, such as model.layers.")
    ] = None,
) -> None:
    """Show the partition of a model: block, layers, parameters, bytes.

    Example: parablock blocks Qwen/Qwen3-0.6B --layers-per-block 2
    """
    from parablock.model.blocks import partition_blocks
    from parablock.model.pretrained import load_model
    from parablock.wire.quantize import FORMATS, payload_bytes

    loaded = load_model(model, dtype="float32", device="cpu", init="pretrained", seed=0)
    table = _table("block", "layers", "parameters", *FORMATS)
    table.caption = "the last columns: bytes, by wire.format"
    partition = partition_blocks(
        loaded.model,
        layers_per_block=layers_per_block,
        split=split,
        include_embeddings=include_embeddings,
        include_head=include_head,
        layers_path=layers_path,
    )
    for block in partition:
        sizes = (f"{payload_bytes(block.num_parameters, name):,}" for name in FORMATS)
        table.add_row(str(block.index), block.name, f"{block.num_parameters:,}", *sizes)
    total = loaded.model.num_parameters()
    trained = sum(block.num_parameters for block in partition)
    console.print(table)
    console.print(
        f"{trained:,} of {total:,} parameters are in blocks; the other {total - trained:,} stay as they are."
    )


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    upload_mbps: Annotated[float | None, typer.Option(help="Instead of link.upload_mbps, 10^6 bit/s.")] = None,
    download_mbps: Annotated[float | None, typer.Option(help="Instead of link.download_mbps.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Load model and data and time real steps here.")] = False,
    output_format: Annotated[Literal["text", "json"], typer.Option("--format", help="Tables or JSON.")] = "text",
) -> None:
    """Predict what a run will take: blocks, bytes, time, memory, and what to change.

    Example: parablock plan configs/t0.yaml --upload-mbps 10 --download-mbps 30
    """
    from parablock.config.load import load_config
    from parablock.plan.forecast import make_plan
    from parablock.plan.view import show_plan

    given = {"link.upload_mbps": upload_mbps, "link.download_mbps": download_mbps}
    link = [f"{key}={value}" for key, value in given.items() if value is not None]
    loaded = load_config(config, [*(overrides or []), *link])
    with Console(stderr=True).status("timing real steps" if probe else "reading the model's configuration"):
        made = make_plan(loaded, probe=probe)
    if output_format == "json":
        typer.echo(json.dumps(asdict(made), indent=2))
        return
    for part in show_plan(made, loaded):
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


@app.command("eval")
def evaluate(
    model_or_run_dir: Annotated[str, typer.Argument(help="A Hugging Face folder or id, or a run directory.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="A file or a `datasets` name; repeatable.")
    ] = None,
    task: Annotated[str, typer.Option(help="loss, exact_match or multiple_choice.")] = "loss",
    max_examples: Annotated[int | None, typer.Option(min=1, help="Score only the first examples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of exact_match.")] = 256,
    data_format: Annotated[
        str | None,
        typer.Option("--format", help="How a row becomes an example; default: as in the run."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, max=3, help="Answers to show.")] = 1,
    harness: Annotated[str, typer.Option(help="Instead of --data: tasks of lm-evaluation-harness.")] = "",
    tasks_dir: Annotated[Path | None, typer.Option(help="A folder with task files of the harness.")] = None,
) -> None:
    """Score the base model and the tuned one side by side.

    Example: parablock eval runs/t0 --data test.jsonl --task exact_match
    """
    if harness:
        _evaluate_by_harness(model_or_run_dir, harness, tasks_dir, max_examples)
        return
    if not data:
        raise typer.BadParameter("give --data, or --harness with tasks of lm-evaluation-harness")
    from parablock.evaluation.side_by_side import score_models

    with console.status("scoring") as status:
        scores = score_models(
            model_or_run_dir,
            data,
            task=task,
            max_examples=max_examples,
            max_new_tokens=max_new_tokens,
            data_format=data_format,
            tell=status.update,
        )
    table = _table("", task, "examples", "model")
    for score in scores:
        table.add_row(score.label, f"{score.value:.4f}", str(score.count), score.name_or_path)
    console.print(table)
    for score in scores:
        for answer in score.samples[:samples]:
            line = f"{score.label} answers {answer.prediction!r} where {answer.reference!r} is right"
            console.print(line, markup=False)


def _evaluate_by_harness(
    model_or_run_dir: str, tasks: str, tasks_dir: Path | None, max_examples: int | None
) -> None:
    from parablock.evaluation.harness import score_with_harness

    with console.status("scoring") as status:
        scores = score_with_harness(
            model_or_run_dir,
            [task.strip() for task in tasks.split(",")],
            tasks_dir=tasks_dir,
            max_examples=max_examples,
            tell=status.update,
        )
    table = _table("", "task", "metric", "value", "examples", "model")
    for score in scores:
        facts = (score.label, score.task, score.metric, f"{score.value:.4f}", str(score.count), score.name_or_path)
        table.add_row(*facts)
    console.print(table)


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(help="A run and those to compare it with, or a folder of runs.")
    ],
) -> None:
    """Write report.html and report.md into the first folder, from the files of runs.

    The page needs no network. Several runs get a table of the settings in which they differ.

    Example: parablock report runs/overlapped runs/serial
    """
    from parablock.report.write import write_report

    page = write_report(directories)
    console.print(f"report: {page}   tables: {page.with_suffix('.md')}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="A YAML file; its data, seed and link hold for every method.")],
    output_dir: OutputDir,
    methods: Annotated[
        str, typer.Option(help="Separated by commas; docs/baselines.md describes each.")
    ] = "parablock,fl_bcd",
    seeds: Annotated[str, typer.Option(help="Separated by commas; default: the configuration's.")] = "",
    delays: Annotated[
        str, typer.Option(help="Such as 0,1, for each method that can have one; default: its own.")
    ] = "",
    overrides: Overrides = None,
    particular: Annotated[
        list[str] | None, typer.Option("--for", help="method:key=value, for that method alone; repeatable.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="exact_match, multiple_choice or both, on data.test.")] = "",
) -> None:
    """Run several methods on the same data, seed and link, and put them side by side.

    Example: parablock compare configs/t0.yaml --methods parablock,fl_bcd,fedavg --output-dir runs/compared
    """
    from parablock.compare import compare_methods, comparison_table, plan_comparison
    from parablock.config.load import load_config

    common = load_config(config, overrides or [])
    runs = plan_comparison(common, methods.split(","), seeds, particular or [], delays)
    scored = [task.strip() for task in tasks.split(",") if task.strip()]
    with show_progress() as (progress, stop):
        summaries = compare_methods(runs, output_dir, progress=progress, tasks=scored, asked_to_stop=stop)
    console.print(comparison_table(summaries), markup=False, highlight=False, soft_wrap=True)
    console.print(f"open {output_dir / 'report.html'}   figures: {output_dir / 'compare.json'}", soft_wrap=True)


@app.command()
def demo(
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="A folder for the results.")] = None,
) -> None:
    """Fine-tune a tiny model over four clients in a few minutes, and show loss, time and overlap.

    Example: parablock demo --output-dir runs/demo
    """
    from parablock.demo.quickstart import describe_demo, free_directory, run_demo

    directory = output_dir or free_directory(Path("runs"))
    with show_progress() as (progress, stop):
        outcome = run_demo(directory, progress=progress, asked_to_stop=stop)
    for line in describe_demo(outcome):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    exit_when_interrupted(outcome.summary, directory)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, memory, disk, missing extras, and a short speed test.

    Example: parablock doctor
    """
    from parablock.cli.doctor import examine

    with console.status("checking this machine"):
        findings = examine()
    styles = {"ok": "", "warning": "yellow", "problem": "red"}
    table = _table("", "check", "found", "cure")
    for finding in findings:
        status_text = Text(finding.status, style=styles[finding.status])
        table.add_row(status_text, finding.name, finding.value, finding.remedy)
    console.print(table)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


def _table(*headings: str) -> Table:
    """Make a table that wraps long numbers and paths, instead of cutting them."""
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def main() -> None:
    """Run the command line; print a `ParaBlockError` on stderr and exit with its code."""
    try:
        app()
    except ParaBlockError as error:
        if "--debug" in sys.argv:
            raise
        lines = [f"error: {error.what}", error.cause, error.remedy]
        print("\n".join(line for line in lines if line), file=sys.stderr)
        sys.exit(error.exit_code)
