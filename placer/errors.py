"""What can go wrong that is the user's to mend.

PlacerError
├── InputError        a file, a flag or a value that cannot be used as it stands
├── ExportError       a launcher cannot express this placement, or a file cannot be written
└── SolverError       the solver contradicts our own arithmetic; nothing it said may be trusted

That no placement exists, or that time ran out, is a result and not an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlacerError(Exception):
    """Base of every error that reaches a user as one sentence and never as a traceback."""


class InputError(PlacerError):
    """A file or value that cannot be used, told as: where, what was found, what was expected."""

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        key: str | None = None,
        line: int | None = None,
    ) -> None:
        self.message = message
        self.file = file
        self.key = key
        self.line = line
        super().__init__(str(self))

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place = f"{place}:{self.line}" if place else f"line {self.line}"
        parts = [part for part in (place, f"`{self.key}`" if self.key else "") if part]
        return ": ".join([*parts, self.message])


class ExportError(PlacerError):
    """A placement that this launcher cannot express, or an output that cannot be written."""


class SolverError(PlacerError):
    """The solver's answer failed our own check, so it was thrown away."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean `x`?` for the known name closest to `name`, or an empty string."""
    by_lower = {item.lower(): item for item in sorted(set(known), reverse=True)}
    matches = difflib.get_close_matches(name.lower(), sorted(by_lower), n=1, cutoff=0.6)
    return f", did you mean `{by_lower[matches[0]]}`?" if matches else ""
