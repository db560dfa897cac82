"""Small pieces every table is made of: cells that cannot be mistaken for markup, folded numbers, percentages.

Nothing here draws boxes or relies on colour: a table must read the same in a log file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from placer.placement import Placement
from placer.spec.model import fold_layer_numbers

T = TypeVar("T")

#: More columns of figures than this do not fit beside their names on 80 characters.
MAX_COLUMNS = 5


def plain(text: object) -> str:
    """Return `text` on one line, with whatever a terminal would act on written as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in str(text)
    )


def cell(text: object, style: str = "") -> Text:
    """Return a cell that shows `text` as it is: square brackets and control characters have no meaning in it."""
    return Text(plain(text), style=style)


def line(*parts: str | tuple[str, str]) -> Text:
    """Return one line from texts, or (text, style) pairs."""
    result = Text()
    for part in parts:
        text, style = part if isinstance(part, tuple) else (part, "")
        result.append(plain(text), style=style or None)
    return result


def table(*columns: str | tuple[str, Literal["left", "right"]], header: bool = True) -> Table:
    """Return an empty table without lines; a column is left-aligned unless told."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=header)
    for column in columns:
        name, justify = column if isinstance(column, tuple) else (column, "left")
        result.add_column(Text(plain(name)), justify=justify, overflow="fold")
    return result


def titled(title: str, what: RenderableType) -> RenderableType:
    """Return a renderable under its title; rich would fold the title of a narrow table."""
    return Group(cell(title, "bold"), what)


def add_row(target: Table, values: Iterable[object], style: str = "") -> None:
    """Add a row of plain cells to a table."""
    target.add_row(
        *(value if isinstance(value, Text) else cell(value) for value in values), style=style or None
    )


def chunks(items: Sequence[T], size: int = MAX_COLUMNS) -> list[Sequence[T]]:
    """Return `items` in runs of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def fold_numbers(numbers: Iterable[int]) -> str:
    """Return whole numbers, sorted and each once, in the short form `0-3, 8` or `0-56:8` (every eighth)."""
    ordered = sorted(set(numbers))
    if not ordered:
        return "-"
    steps = {second - first for first, second in pairwise(ordered)}
    if len(ordered) > 2 and len(steps) == 1:
        return fold_layer_numbers(ordered)
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def percent(share: float) -> str:
    """Return a share as a percentage with two digits that matter: `0.19 %`, `37 %`."""
    value = 100 * share
    if abs(value) <= 1e-4:
        return "0 %"
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.2g} %"


def count(number: int, one: str, many: str | None = None) -> str:
    """Return `1 rank` or `12 ranks`."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def billions(number: int) -> str:
    """Return a parameter count rounded for a person: `46.7 B`, `12 M`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return str(number)


def shown_coordinates(placement: Placement) -> list[str]:
    """Return the coordinates worth showing: dp and tp, and whatever is not 0 everywhere; experts' only with experts."""
    names = ("stage", "dp", "tp", *(("ep", "etp", "edp") if placement.experts else ()))
    return [
        name
        for name in names
        if name in ("dp", "tp") or any(getattr(record, name) for record in placement.ranks)
    ]
