"""What every part of the record has in common: no unknown field, no change, nothing but text."""

from typing import Annotated, Any

from pydantic import AllowInfNan, BaseModel, ConfigDict, field_validator

Loss = Annotated[float, AllowInfNan(True)]
"""A measured loss. It can be infinite or no number; the file then holds "Infinity" or "NaN"."""


class Record(BaseModel):
    """A part of `results.json`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="strings"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        return _as_text(value)


def _as_text(value: Any) -> Any:
    """The value with "?" for what is no text: a path can hold any bytes, and JSON cannot."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return value
