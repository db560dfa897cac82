"""The one configuration every stated thing shares: frozen, and unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Stated(BaseModel):
    """Something a user states in a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True)
