"""The commands of `parablock`.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 stopped by Ctrl-C with everything saved.
"""

from __future__ import annotations

import atexit
import gc
import json
import re
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import requires
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from parablock import __version__
from parablock.cli.audit import audit
from parablock.cli.deploy import deploy
from parablock.cli.evaluate import evaluate
from parablock.cli.export_run import export
from parablock.cli.forgetting import forget
from parablock.cli.output import SafeConsole, is_closed_pipe, lasting_output, say, say_whole
from parablock.cli.show_data import columns_of, data
from parablock.cli.talk import chat, generate
from parablock.cli.terminal import (
    CONFIGURING,
    LOADING,
    SAME_COMMAND,
    Overrides,
    check_config,
    console,
    exit_when_interrupted,
    free_directory,
    print_figures,
    print_summary,
    refuse_empty_words,
    say_options_for,
    show_progress,
    show_work,
    usual_signals,
)
from parablock.cli.word_table import WordTable
from parablock.errors import ConfigError, ParaBlockError, as_own_error
from parablock.printable import as_argument, in_one_line
from parablock.storage import FIGURES_NAME

app = typer.Typer(
    name="parablock",
    help="Federated fine-tuning of LLMs over slow links: one block at a time, communication under computation.",
    no_args_is_help=True,
    suggest_commands=not any(map(re.compile("click\\b").match, requires("typer") or ())),  # click does so itself
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(deploy, name="deploy")
app.command()(data)
app.command()(export)
app.command()(chat)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(audit)
app.command()(forget)

WRITES_FILES = {"run", "resume", "compare", "demo", "deploy", "report", "init", "export", "forget"}
"""Commands whose results are files, not what they print."""

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file; see docs/configuration.md.")]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="A folder for the results; it must hold no run yet.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        say(f"parablock {__version__}")
        raise typer.Exit
    del debug  # read by `main`
    usual_signals()


@app.command()
def run(
    config: ConfigFile,
    output_dir: OutputDir,
    overrides: Overrides = None,
) -> None:
    """Run one federated fine-tuning.

    Example: parablock run configs/t0.yaml --output-dir runs/t0 --set federation.delay=0
    """
    with show_progress(output_dir) as (progress, stop):
        progress.stage(CONFIGURING, is_brief=True)
        from parablock.config.load import load_config

        settings = load_config(config, overrides or [])  # before torch is loaded, so that errors show at once
        check_config(settings, output_dir)
        progress.stage(LOADING, is_brief=True)
        from parablock.experiment.run import run as run_experiment

        summary = run_experiment(settings, output_dir, progress=progress, asked_to_stop=stop)
    print_summary(summary, output_dir)


@app.command()
def resume(directory: Annotated[Path, typer.Argument(help="The --output-dir of an earlier run.")]) -> None:
    """Continue a run from its newest checkpoint; the result is bitwise that of a run that never stopped.

    Example: parablock resume runs/t0
    """
    with show_progress(directory) as (progress, stop):
        from parablock.config.load import load_config
        from parablock.storage.run_directory import RunDirectory

        config = RunDirectory(directory).config
        RunDirectory(directory).check_resumable()
        progress.stage(LOADING, is_brief=True)
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
def init(
    files: Annotated[list[str], typer.Argument(help="Your files; several are a client each.")],
    model: Annotated[
        str, typer.Option(help="A Hugging Face folder or id; by default a small one that a CPU can tune.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("config.yaml"),
    clients: Annotated[
        int | None, typer.Option(min=1, help="Clients; default: one for each file, or two of one file.")
    ] = None,
    trains: Annotated[
        Literal["adapters", "blocks"] | None,
        typer.Option(help="Default: adapters, if they hold what the files have to learn."),
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="field=column, as data.columns; repeatable.")
    ] = None,
) -> None:
    """Write a configuration with comments for a first run, from a model and files of text.

    Example: parablock init site_a.jsonl site_b.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    with show_work() as progress:
        from parablock.data.sources import check_places
        from parablock.model.place import find_source
        from parablock.storage.files import NEW_NAME, check_absent

        check_absent(output, NEW_NAME)
        check_places(files, split="train")
        find_source(model, given_as="--model")
        progress.stage(LOADING, is_brief=True)
        from parablock.experiment.first_config import write_first_config

        progress.stage("reading the files and the model's configuration", is_brief=True)
        named = columns_of(columns)
        found = write_first_config(model, files, output, clients=clients, trains=trains, columns=named)
    say(*found, f"written: {output}", f"next: parablock plan {as_argument(output)}")


@app.command()
def blocks(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or id.")],
    layers_per_block: Annotated[int, typer.Option(help="Decoder layers in a block.")] = 1,
    split: Annotated[
        str, typer.Option(help="layer, or attention_mlp: attention and MLPs as separate blocks.")
    ] = "layer",
    include_embeddings: Annotated[
        bool, typer.Option("--include-embeddings", help="Make the embeddings a block.")
    ] = False,
    include_head: Annotated[
        bool, typer.Option("--include-head", help="Make the final norm and the head a block.")
    ] = False,
    layers_path: Annotated[
        str | None, typer.Option(help="Path of the decoder layers, such as model.layers.")
    ] = None,
) -> None:
    """Show the partition of a model: block, layers, parameters, bytes. It reads the model's configuration alone.

    Example: parablock blocks Qwen/Qwen3-0.6B --layers-per-block 2
    """
    with show_work() as progress:
        from parablock.model.place import find_source

        find_source(model, given_as="MODEL")
        progress.stage(LOADING, is_brief=True)
        from parablock.model.blocks import partition_blocks
        from parablock.model.pretrained import outline_model
        from parablock.report.units import format_bytes
        from parablock.wire.quantize import FORMATS, payload_bytes

        progress.stage(f"reading the configuration of {model}", is_brief=True)
        outline = outline_model(model, dtype="float32")
    table = WordTable("block", "layers", "parameters", *FORMATS, num_words=2, narrow=True)
    table.caption = "the last columns: bytes of an update, by wire.format"
    partition = partition_blocks(
        outline,
        layers_per_block=layers_per_block,
        split=split,
        include_embeddings=include_embeddings,
        include_head=include_head,
        layers_path=layers_path,
    )
    for block in partition:
        sizes = (format_bytes(payload_bytes(block.num_parameters, name)) for name in FORMATS)
        table.add_row(str(block.index), block.name, f"{block.num_parameters:,}", *sizes)
    total = outline.num_parameters()
    trained = sum(block.num_parameters for block in partition)
    console.print(table)
    say(f"{trained:,} of {total:,} parameters are in blocks; the other {total - trained:,} stay as they are.")


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
    given = {"link.upload_mbps": upload_mbps, "link.download_mbps": download_mbps}
    link = [f"{key}={value}" for key, value in given.items() if value is not None]
    given_keys = [*(overrides or []), *link]
    with show_work() as progress:
        progress.stage(CONFIGURING, is_brief=True)
        from parablock.config.load import lacks_rows, load_config, load_server_config

        if lacks_rows(config, given_keys):
            if probe:
                raise ConfigError(
                    ["--probe times real steps, and needs rows: data.train is not given"], source=str(config)
                )
            loaded = load_server_config(config, given_keys)
            progress.message(
                "data.train is not given: planned for sites that have the rows, of data.max_length tokens."
            )
        else:
            loaded = load_config(config, given_keys)
        if loaded.data.train:  # else the rows of both splits are at the sites
            check_config(loaded, None)
        progress.stage(LOADING, is_brief=True)
        from parablock.plan.forecast import make_plan
        from parablock.plan.view import next_step, show_plan

        progress.stage("timing real steps" if probe else "reading the model's configuration", is_brief=True)
        made = make_plan(loaded, probe=probe)
    if output_format == "json":
        say_whole(json.dumps(asdict(made), indent=2))
        return
    for part in (*show_plan(made, loaded), *next_step(made, loaded, config)):
        say(part) if isinstance(part, str) else console.print(part, highlight=False)


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(help="A run and those to compare it with, or a folder of runs.")
    ],
) -> None:
    """Write report.html and report.md into the first folder, from the files of runs.

    The page needs no network. Several runs get a table of the settings in which they differ, in place of the first
    one's own page; `parablock report` with that run alone writes its own again.

    Example: parablock report runs/overlapped runs/serial
    """
    with show_work() as progress:
        progress.stage("writing the report", is_brief=True)
        from parablock.report.write import write_report

        page = write_report(directories)
    say(f"report: {page}   tables: {page.with_suffix('.md')}")


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
    tasks: Annotated[str, typer.Option(help="Of exact_match, rouge_l and multiple_choice, on data.test.")] = "",
) -> None:
    """Run several methods on the same data, seed and link, and put them side by side.

    A comparison that was stopped goes on with the same command.

    Example: parablock compare configs/t0.yaml --methods parablock,fl_bcd,fedavg --output-dir runs/compared
    """
    scored = [task.strip() for task in tasks.split(",") if task.strip()]
    with show_progress(output_dir, SAME_COMMAND) as (progress, stop):
        progress.stage(CONFIGURING, is_brief=True)
        from parablock.config.load import load_config

        settings = load_config(config, overrides or [])
        check_config(settings, output_dir)
        progress.stage(LOADING, is_brief=True)
        from parablock.compare import compare_methods, comparison_table, plan_comparison

        runs = plan_comparison(settings, methods.split(","), seeds, particular or [], delays)
        summaries = compare_methods(runs, output_dir, progress=progress, tasks=scored, asked_to_stop=stop)
    print_figures(comparison_table(summaries))
    say(f"open {output_dir / 'report.html'}   figures: {output_dir / FIGURES_NAME}")


@app.command()
def demo(
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="A folder for the results.")] = None,
) -> None:
    """Fine-tune a tiny model over four clients in a few minutes, and show loss, time and overlap.

    Example: parablock demo --output-dir runs/demo
    """
    directory = output_dir or free_directory(Path("runs"), "demo")
    with show_progress(directory) as (progress, stop):
        progress.stage(LOADING, is_brief=True)
        from parablock.demo.quickstart import describe_demo, run_demo

        outcome = run_demo(directory, progress=progress, asked_to_stop=stop)
    for line in describe_demo(outcome):
        console.print_as_it_is(in_one_line(line))
    exit_when_interrupted(outcome.summary, directory)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, memory, disk, missing extras, and a short speed test.

    Example: parablock doctor
    """
    with show_work() as progress:
        progress.stage(LOADING, is_brief=True)
        from parablock.cli.doctor import as_table, examine

        progress.stage("checking this machine", is_brief=True)
        findings = examine()
    console.print(as_table(findings))
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; print a `ParaBlockError` on stderr and exit with its code."""
    atexit.register(gc.freeze)  # the end of Python need not look all of torch through for cycles, for seconds
    with lasting_output() as output:
        try:
            refuse_empty_words(sys.argv[1:])
            app()
        except (ParaBlockError, PermissionError) as raised:
            error = as_own_error(raised)
            if "--debug" in sys.argv:
                SafeConsole(stderr=True).print_as_it_is("".join(traceback.format_exception(raised)).rstrip())
                sys.exit(error.exit_code)
            say(*f"error: {error}".split("\n"), err=True)
            say_options_for(str(error), sys.argv[1:])
            sys.exit(error.exit_code)
        except SystemExit as leaving:
            output.flush()
            if output.failure is not None and not is_closed_pipe(output.failure):
                leaving.code = _tell_of_lost_output(output.failure, leaving.code)
            raise


def _tell_of_lost_output(failure: OSError, code: Any) -> Any:
    """Say that output was lost; return the exit code, which is 1 where the output was the result."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    lost = f"the output could not be written: {failure.strerror}"
    if command in WRITES_FILES:
        say(f"warning: {lost}; the files are whole", err=True)
        return code
    say(f"error: {lost}", err=True)
    return code or 1
