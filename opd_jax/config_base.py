"""What every block of the config is: immutable, strict about keys and types."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class PathMark:
    """Marks a string as the path of an input file, so that the loader resolves it."""


PathStr = Annotated[str, PathMark(), Field(min_length=1)]


class Frozen(BaseModel):
    """A config node: immutable, strict about unknown keys and about types, without infinities."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )
