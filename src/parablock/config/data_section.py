"""The section `data`: the rows, their format, and their split over the clients."""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from parablock.config.section import Section, default_of
from parablock.data.formats import check_columns


def one_or_many(value: Any) -> Any:
    """Return one name as a list, and refuse an empty one."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and "" in names:
        raise ValueError("holds an empty name")
    return names


def _iso_day(value: Any) -> Any:
    if isinstance(value, date):  # as YAML reads a day
        return value.isoformat()
    try:
        return None if value is None else date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"must be a day such as 2025-01-31, not {value!r}") from None


class PartitionSection(Section):
    """The split of the training rows over the clients."""

    scheme: Literal["iid", "dirichlet", "by_field", "by_file"] = Field("iid", description="The way of splitting.")
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; smaller is more heterogeneous.")
    field: str | None = Field(None, description="The field that `dirichlet` and `by_field` split by.")

    @model_validator(mode="after")
    def _field_where_needed(self) -> PartitionSection:
        if self.scheme in ("dirichlet", "by_field") and not self.field:
            raise ValueError(f"scheme {self.scheme} needs `field`: the field of the rows to split by")
        if self.scheme != "dirichlet" and self.alpha != default_of(self, "alpha"):
            raise ValueError(f"alpha takes effect with scheme dirichlet only, not with {self.scheme}")
        return self


class DataSection(Section):
    """Training and test rows."""

    train: tuple[str, ...] = Field(
        description="Files (JSONL, JSON, CSV, TSV, Parquet, Arrow; .gz, .zst), folders, patterns, hub names."
    )
    test: tuple[str, ...] = Field((), description="Held-out rows. Empty: a part of each client's rows.")
    test_fraction: float = Field(0.1, gt=0, lt=1, description="The part held out where `test` is empty.")
    format: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "input_output", "gsm8k", "text"
    ] = Field("auto", description="How a row becomes an example; `auto` looks at the fields of each source.")
    columns: dict[str, str] = Field(
        {}, description="Field of a format: the column of the files that holds it, as in `{prompt: frage}`."
    )
    max_length: int = Field(512, ge=8, description="Tokens of an example; longer ones are cut at the end.")
    date: str | None = Field(
        None, description="The day that a chat template writes, YYYY-MM-DD; null: the day when the run starts."
    )
    partition: PartitionSection = PartitionSection()

    _names = field_validator("train", "test", mode="before")(one_or_many)
    _day = field_validator("date", mode="before")(_iso_day)

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, value: dict[str, str]) -> dict[str, str]:
        check_columns(value)
        return value

    @model_validator(mode="after")
    def _one_test_set(self) -> DataSection:
        if self.test and self.test_fraction != default_of(self, "test_fraction"):
            raise ValueError("test_fraction takes effect where `test` is empty only; leave one of them out")
        return self
