"""The rows of a run that is over: those that were held out, and those that were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parablock.config.load import load_config
from parablock.data.formats import repeated_rows
from parablock.data.sources import Row, rows_sha256
from parablock.errors import DataError
from parablock.experiment.inputs import read_rows
from parablock.storage.run_directory import RunDirectory


def is_run(model_or_run_dir: str) -> bool:
    """Return whether a path is a run directory."""
    return RunDirectory(model_or_run_dir).config.exists()


@dataclass(frozen=True)
class RowsOfRun:
    """The data of a run, read again.

    Attributes:
        trained: The rows that were trained on, which those of an excluded client were not; None: not known, as the
            data for training have changed.
        held_out: The rows that the run was scored on.
        owners: For each held-out row the client whose it was; empty where they are in files of their own.
        data_format: The run's `data.format`.
    """

    trained: list[Row] | None
    held_out: list[Row]
    owners: list[int]
    data_format: str

    def trained_on(self, rows: Sequence[Row], data_format: str | None) -> int | None:
        """Count the rows that say what one said that was trained on; None: not known.

        Args:
            rows: The rows in question.
            data_format: How they are read; None: as those of the run.
        """
        if self.trained is None:
            return None
        read_as = data_format or self.data_format
        return len(repeated_rows(rows, self.trained, data_format=read_as, known_format=self.data_format))


def rows_of_run(run_dir: str) -> RowsOfRun:
    """Read the data of a run again.

    Raises:
        DataError: The data are gone, the held-out rows are others, or they are at the sites.
    """
    directory = RunDirectory(run_dir)
    config = load_config(directory.config)
    if not config.data.train and not config.data.test:
        raise DataError(
            f"the rows of the run in {run_dir} are at its sites", remedy="Give rows to score on with --data."
        )
    parts, held_out, owners = read_rows(
        config.data,
        num_clients=config.federation.num_clients,
        seed=config.seed,
        pooled=config.federation.traits.pools_data,
    )
    written = directory.read_manifest()["data_sha256"]
    if written["test"] != rows_sha256(held_out):
        raise DataError(
            f"the data files are not those of the run in {run_dir}: its held-out rows differ",
            cause="A file was changed after the run.",
            remedy="Put the files back, or give rows to score on with --data.",
        )
    if written["train"] != [rows_sha256(part) for part in parts]:
        return RowsOfRun(None, held_out, owners, config.data.format)
    excluded = config.federation.excluded_clients
    trained = [row for client_id, part in enumerate(parts) if client_id not in excluded for row in part]
    return RowsOfRun(trained, held_out, owners, config.data.format)
