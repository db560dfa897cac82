"""Folded numbers, percentages, and cells that mean nothing to a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from placer.report.tables import (
    add_row,
    billions,
    cell,
    chunks,
    count,
    fold_numbers,
    line,
    percent,
    plain,
    table,
)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], "-"),
        ([3], "3"),
        ([2, 5], "2, 5"),
        ([0, 1, 2, 3], "0-3"),
        ([3, 1, 1, 2, 8], "1-3, 8"),
        ([0, 8, 16, 24], "0-24:8"),
        ([0, 1, 4, 5], "0-1, 4-5"),
    ],
)
def test_numbers_fold(numbers: list[int], text: str) -> None:
    assert fold_numbers(numbers) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1e-7, "0 %"), (0.001877, "0.19 %"), (0.0996, "10 %"), (0.46, "46 %"), (0.9972, "100 %")],
)
def test_percentages_keep_two_digits(share: float, text: str) -> None:
    assert percent(share) == text


def test_counts_and_parameters_read_well() -> None:
    assert [count(1, "rank"), count(12, "rank"), count(2, "entry", "entries")] == [
        "1 rank",
        "12 ranks",
        "2 entries",
    ]
    assert [billions(number) for number in (12, 7_200_000, 46_702_792_704, 2_000_000_000_000)] == [
        "12",
        "7.2 M",
        "46.7 B",
        "2 T",
    ]


def test_chunks_hold_everything_in_order() -> None:
    assert [list(part) for part in chunks([1, 2, 3, 4, 5, 6, 7], 3)] == [[1, 2, 3], [4, 5, 6], [7]]


def test_control_characters_are_shown_and_not_sent() -> None:
    assert plain("a\x1b[31mb\nc\udc80") == "a\\x1b[31mb\\nc\\udc80"


def test_markup_in_a_name_is_only_text_even_on_a_console_that_reads_markup() -> None:
    stream = io.StringIO()
    console = Console(file=stream, markup=True, width=80, force_terminal=False)
    rows = table("host")
    add_row(rows, ["[bold]node[/bold][link=http://x]"])
    console.print(rows)
    console.print(cell("[red]x"))
    console.print(line(("[blink]y", "bold"), "[/z]"))
    assert stream.getvalue().split() == ["host", "[bold]node[/bold][link=http://x]", "[red]x", "[blink]y[/z]"]
