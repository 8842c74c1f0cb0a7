"""The command `parablock export`: a run's model in the form that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from parablock.cli.terminal import console


def export(
    run_dir: Annotated[str, typer.Argument(help="The --output-dir of a finished run.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="A new folder.")],
    export_format: Annotated[
        Literal["hf", "adapter", "delta"],
        typer.Option("--format", help="A Hugging Face folder, a LoRA adapter for peft, or tuned minus base."),
    ] = "hf",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the adapter; default: the run's own, or 16 without one.")
    ] = None,
) -> None:
    """Write the model of a finished run in another form.

    Example: parablock export runs/t0 --format adapter --output-dir adapter
    """
    from parablock.experiment.export import export_run

    with console.status("exporting") as status:
        notes = export_run(run_dir, output_dir, export_format=export_format, rank=rank, tell=status.update)
    for note in [*notes, f"{export_format}: {output_dir}"]:
        console.print(note, highlight=False, soft_wrap=True)
