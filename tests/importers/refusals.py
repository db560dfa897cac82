"""What every reader promises for input of any kind: an answer, or an InputError of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from placer.errors import InputError


@contextmanager
def answer_or_refusal() -> Iterator[None]:
    """Let an InputError of one line pass, and nothing else."""
    try:
        yield
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError(f"a refusal of several lines: {error!r}") from None
