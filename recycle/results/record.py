"""What every part of the record has in common: no unknown field, no change, no infinity."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A part of `results.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
