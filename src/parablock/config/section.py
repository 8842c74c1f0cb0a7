"""What every section of the configuration shares: how it is made, and how it refuses."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

NOT_BUILT = "is not built yet in this version"


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, defaults validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_and_no_word(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where pydantic would take it for 1, and YAML's `on` and `no` where a word is meant."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"must not be {str(value).lower()}; a word such as on, off, yes, no needs quotes")
        return value


def default_of(section: Section, key: str) -> Any:
    """Give the default of a key."""
    return type(section).model_fields[key].default
