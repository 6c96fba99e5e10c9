"""What every section of a configuration has in common: strict keys, and values that files and devices can hold."""

import difflib
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jlora.files.paths import expand_home
from jlora.files.text import find_secret

NonEmpty = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
FLOAT32 = (2.0**-126, 2.0**127)  # sizes of numbers that are neither zero, denormal nor infinite in it


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and values do not change once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        """Text goes into config.yaml, logs and names of files, a path may begin with `~`; numbers meet float32."""
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError("holds a NUL character")
            if secret := find_secret(value):
                raise ValueError(
                    f"holds {secret}, which would be written to config.yaml and to logs; leave it in the environment "
                    "or log in (hf auth login)"
                )
            return expand_home(value)
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, float) and number and not FLOAT32[0] <= abs(number) <= FLOAT32[1]:
                raise ValueError(f"is {number:g}, beyond what float32 holds; choose a size from 1e-37 to 1e38")
        return value

    @model_validator(mode="after")
    def _no_conflict(self) -> "Section":
        for sentence in self.conflicts():
            raise ValueError(sentence)
        return self

    def conflicts(self) -> Iterator[str]:
        """What is wrong with the keys together, or with one that no type says; the first is told."""
        yield from ()


def nearest(name: str, known: Any, prefix: str = "") -> str:
    """What follows a name that is not known: the nearest one, behind what all begin with, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{close[0]}'?" if close else f"; known are {', '.join(known)}"
