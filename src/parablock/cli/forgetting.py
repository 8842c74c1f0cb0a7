"""`parablock forget`: what it costs to replay a run without a client, and the replay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parablock.cli.output import say
from parablock.cli.terminal import LOADING, print_summary, show_progress, show_work
from parablock.printable import counted
from parablock.report.units import format_bytes, format_duration

if TYPE_CHECKING:
    from parablock.experiment.forget import Replay


def forget(
    directory: Annotated[Path, typer.Argument(help="The --output-dir of an earlier run.")],
    client_id: Annotated[int, typer.Option("--client", min=0, help="The client to forget.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="A folder for the run without it; default: beside the run.")
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what it costs.")] = False,
) -> None:
    """Replay a run without one of its clients, bitwise as if it had never taken part; say first what that costs.

    Example: parablock forget runs/t0 --client 2 --yes
    """
    with show_work() as work:
        work.stage(LOADING, is_brief=True)
        from parablock.experiment.forget import forget as forget_client
        from parablock.experiment.forget import replay_without

        replay = replay_without(directory, client_id)
    new_dir = output_dir or directory.resolve().with_name(f"{directory.resolve().name}-without-{client_id}")
    say(*_described(replay, client_id, new_dir))
    if not yes:
        say("Nothing has been done. Do it with --yes.")
        return
    with show_progress(new_dir) as (progress, stop):
        summary = forget_client(directory, client_id, new_dir, progress=progress, asked_to_stop=stop)
    print_summary(summary, new_dir)
    say(f"{directory} still holds what client {client_id} sent: remove it, and its copies.")


def _described(replay: Replay, client_id: int, new_dir: Path) -> Iterator[str]:
    if replay.first_round is None:
        yield f"No round of the run asks client {client_id}: its model is that of a run without it."
    else:
        yield f"The first round that asked client {client_id} is round {replay.first_round + 1}."
    where = f"from the checkpoint after round {replay.begins_at}" if replay.begins_at else "from the base model"
    yield f"The run is replayed {where}: {counted(replay.num_rounds, 'round')}, into {new_dir}."
    yield (
        f"In the run these rounds took {format_duration(replay.seconds)} and moved "
        f"{format_bytes(replay.total_bytes)}; this time all clients but this one take part."
    )
    if replay.releases_again:
        yield (
            "The run adds noise: the replay draws it anew, and the other clients release further updates."
            " Add the ε of both runs for them."
        )
