"""The base class of all sections of the configuration, and the section of a fault."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

NOT_BUILT = "is not built yet in this version"


class Section(BaseModel):
    """A section: frozen, without unknown keys, with validated defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_and_no_word(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` as a number, where pydantic would read 1, and as a word."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"must not be {str(value).lower()}; as a word it needs quotes")
        return value


def default_of(section: Section, key: str) -> Any:
    """Return the default of a key."""
    return type(section).model_fields[key].default


POISONS = ("nan", "sign_flip", "scale")
"""Kinds of fault that change the values of an update."""

KINDS_AT = {
    "train": ("kill", "delay", "drop", *POISONS),
    "upload": ("kill", "delay", "drop", "corrupt", *POISONS),
    "download": ("kill", "delay", "drop", "corrupt"),
    "commit": ("kill", "delay"),
}
"""The kinds of fault at each point of a round."""


class FaultSection(Section):
    """One fault: its client, round, point of the round, and kind."""

    client: int = Field(ge=0, description="The client_id.")
    round: int = Field(ge=0, description="The round.")
    at: Literal["train", "upload", "download", "commit"] = Field(description="The point of the round.")
    kind: Literal["drop", "delay", "corrupt", "nan", "sign_flip", "scale", "kill"] = Field(
        description="The kind of fault."
    )
    value: float | None = Field(None, description="Seconds, or the factor of `scale`.")

    @model_validator(mode="after")
    def _there_is_such_a_fault(self) -> FaultSection:
        kinds = KINDS_AT[self.at]
        if self.kind not in kinds:
            raise ValueError(f"there is no {self.kind} at {self.at}; there are {', '.join(kinds)}")
        takes = self.kind in ("kill", "delay", "scale") or (self.kind == "drop" and self.at != "train")
        needs = self.kind in ("delay", "scale") or (self.kind == "drop" and self.at == "download")
        meaning = "the factor" if self.kind == "scale" else "seconds"
        if needs and self.value is None:
            raise ValueError(f"{self.kind} at {self.at} needs a value: {meaning}")
        if self.value is not None and not takes:
            raise ValueError(f"a value has no effect with {self.kind} at {self.at}; leave it out")
        if self.value is not None and self.value < 0 and self.kind != "scale":
            raise ValueError(f"value is {meaning}, at least 0, not {self.value:g}")
        return self
