"""The command `parablock export`: a run's model in the form that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from parablock.cli.output import say
from parablock.cli.terminal import LOADING, show_work


def export(
    run_dir: Annotated[str, typer.Argument(help="The --output-dir of a finished run.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="A new folder.")],
    export_format: Annotated[
        Literal["hf", "gguf", "adapter", "delta"],
        typer.Option(
            "--format",
            help="A Hugging Face folder, a file for llama.cpp, a LoRA adapter for peft, or tuned minus base.",
        ),
    ] = "hf",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the adapter; default: the run's own, or 16 without one.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            metavar="TYPE",
            help="float32, float16 or bfloat16: of the matrices of a GGUF file; default: that of the model.",
        ),
    ] = None,
    push_to_hub: Annotated[
        str,
        typer.Option(metavar="OWNER/NAME", help="Also upload the folder to this repository; HF_TOKEN is the key."),
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; without this, it is private.")
    ] = False,
) -> None:
    """Write the model of a finished run in another form, and upload it where asked.

    Example: parablock export runs/t0 --format gguf --output-dir gguf
    """
    for option, given, form in (("--rank", rank, "adapter"), ("--dtype", dtype, "gguf")):
        if given is not None and export_format != form:
            raise typer.BadParameter(f"{option} is for --format {form}, and this is {export_format}")
    if public and not push_to_hub:
        raise typer.BadParameter("--public is for --push-to-hub OWNER/NAME")
    with show_work() as progress:
        from parablock.storage.files import NEW_FOLDER, check_absent
        from parablock.storage.run_directory import RunDirectory

        run = RunDirectory(run_dir)
        run.check_holds_run()
        run.check_has_model()
        check_absent(output_dir, NEW_FOLDER)
        progress.stage(LOADING, is_brief=True)
        from parablock.experiment.export import export_run
        from parablock.experiment.upload import check_upload, upload_folder

        if push_to_hub:
            check_upload(push_to_hub)
        progress.stage("exporting", is_brief=True)
        notes = export_run(
            run_dir,
            output_dir,
            export_format=export_format,
            rank=rank,
            dtype=dtype,
            tell=lambda text: progress.stage(text, is_brief=True),
        )
        notes.append(f"{export_format}: {output_dir}")
        if push_to_hub:
            progress.stage(f"uploading to {push_to_hub}", is_brief=True)
            notes.append(f"uploaded: {upload_folder(output_dir, push_to_hub, private=not public)}")
    say(*notes)
