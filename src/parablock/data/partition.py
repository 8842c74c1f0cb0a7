"""Partition of the data over clients: at random, by Dirichlet label skew, by a field, or by file."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from parablock.data.sources import Row
from parablock.errors import DataError
from parablock.printable import counted
from parablock.seeding import generator_for, seed_for

SCHEMES = ("iid", "dirichlet", "by_field", "by_file")

Partition = tuple[tuple[Row, ...], ...]
"""The rows of each client, by client_id; every row has exactly one client."""


def partition_rows(
    rows_per_source: Sequence[Sequence[Row]],
    *,
    scheme: str,
    num_clients: int,
    alpha: float = 0.5,
    field: str | None = None,
    seed: int,
) -> Partition:
    """Assign every row to one client, so that every client has at least one.

    Args:
        rows_per_source: The rows of each source, in the configured order.
        scheme: `iid` (shuffled, equal shares), `dirichlet` (the rows of each value of `field` split by a draw from
            Dirichlet(alpha)), `by_field` (one value of `field` per client, values sorted) or `by_file`
            (one source per client).
        num_clients: Number of clients.
        alpha: Concentration of `dirichlet`; clients differ more for a smaller alpha.
        field: The field that `dirichlet` and `by_field` use.
        seed: The run's seed.

    Raises:
        DataError: The scheme would leave a client without rows, or a row lacks the field.
    """
    if scheme == "by_file":
        return _split_by_file(rows_per_source, num_clients)
    rows = [row for source in rows_per_source for row in source]
    if num_clients < 1 or len(rows) < num_clients:
        raise DataError(
            f"{counted(len(rows), 'row')} cannot be split over {counted(num_clients, 'client')}.",
            remedy="Every client needs at least one row: lower federation.num_clients or add data.",
        )
    if scheme == "iid":
        return _split_iid(rows, num_clients, seed)
    if scheme == "dirichlet":
        return _split_dirichlet(rows, num_clients, alpha, _check_field(rows, scheme, field), seed)
    if scheme == "by_field":
        return _split_by_field(rows, num_clients, _check_field(rows, scheme, field))
    raise DataError(f"Unknown partition scheme {scheme!r}.", remedy=f"Known are {', '.join(SCHEMES)}.")


def _split_by_file(rows_per_source: Sequence[Sequence[Row]], num_clients: int) -> Partition:
    if len(rows_per_source) != num_clients:
        names = ", ".join(rows[0].source if rows else "(empty)" for rows in rows_per_source)
        raise DataError(
            f"by_file gives one source to each client, but there are {len(rows_per_source)} sources and "
            f"{num_clients} clients: {names}.",
            remedy=f"Set federation.num_clients: {len(rows_per_source)}, or list as many sources as clients.",
        )
    for client_id, rows in enumerate(rows_per_source):
        if not rows:
            raise DataError(f"Client {client_id} would have no rows: its source is empty.", remedy="Leave it out.")
    return tuple(tuple(rows) for rows in rows_per_source)


def _split_iid(rows: Sequence[Row], num_clients: int, seed: int) -> Partition:
    order = generator_for(seed, "partition").permutation(len(rows))
    return tuple(tuple(rows[index] for index in part) for part in np.array_split(order, num_clients))


def _split_dirichlet(rows: Sequence[Row], num_clients: int, alpha: float, field: str, seed: int) -> Partition:
    import datasets  # slow to import
    from flwr_datasets.partitioner import DirichletPartitioner

    if alpha <= 0:
        raise DataError(f"alpha is {alpha}.", cause="A Dirichlet distribution needs alpha > 0.", remedy="Raise it.")
    values, labels = _number_labels(rows, field)
    partitioner = DirichletPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        alpha=float(alpha),
        min_partition_size=1,
        seed=seed_for(seed, "partition"),
    )
    try:  # without progress bars, and without warnings about repeated draws
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            partitioner.dataset = datasets.Dataset.from_dict({"index": list(range(len(rows))), "label": labels})
            parts = [list(partitioner.load_partition(client_id)["index"]) for client_id in range(num_clients)]
    except ValueError as error:
        raise DataError(
            f"No Dirichlet({alpha}) draw over {len(rows)} rows and {len(values)} values of {field!r} gave each of "
            f"{num_clients} clients at least one row.",
            cause=f"alpha is small for so many clients. {' '.join(str(error).split())}",
            remedy="Raise data.partition.alpha, lower federation.num_clients, or take another seed.",
        ) from error
    return tuple(tuple(rows[index] for index in part) for part in parts)


def _split_by_field(rows: Sequence[Row], num_clients: int, field: str) -> Partition:
    values, labels = _number_labels(rows, field)
    if len(values) != num_clients:
        shown = ", ".join(repr(value) for value in values[:10]) + (", …" if len(values) > 10 else "")
        raise DataError(
            f"by_field gives one value of {field!r} to each client, but there are "
            f"{counted(len(values), 'value')} and {counted(num_clients, 'client')}: {shown}.",
            remedy=f"Set federation.num_clients: {len(values)}, or choose another field.",
        )
    parts: list[list[Row]] = [[] for _ in values]
    for row, label in zip(rows, labels, strict=True):
        parts[label].append(row)
    return tuple(map(tuple, parts))


def _check_field(rows: Sequence[Row], scheme: str, field: str | None) -> str:
    if field is None:
        raise DataError(
            f"Partition scheme {scheme} needs a field, and none is set.",
            remedy=f"Set data.partition.field to one of: {', '.join(rows[0].fields)}.",
        )
    for row in rows:
        value = row.fields.get(field)
        if value is None or not isinstance(value, Hashable):
            problem = f"has no value in field {field!r}" if value is None else f"has no single value in {field!r}"
            raise DataError(
                f"{row.place} {problem}, by which the rows are split; it has the fields {', '.join(row.fields)}.",
                remedy="Choose a field for data.partition.field that is a string or a number in every row.",
            )
    return field


def _number_labels(rows: Sequence[Row], field: str) -> tuple[list[Any], list[int]]:
    """Number the values of a field in sorted order: numbers first, then all others as text."""
    present = {row.fields[field] for row in rows}
    values = sorted(present, key=lambda v: (0, v, "") if isinstance(v, int | float) else (1, 0, str(v)))
    number = {value: label for label, value in enumerate(values)}
    return values, [number[row.fields[field]] for row in rows]
