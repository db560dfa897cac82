"""The report on an expert map just made: its proof, what was moved, and what else there was to choose."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from placer.cost.expert_score import score_map
from placer.importers.routing import Routing
from placer.report.experts import placed_report
from tests.expert_maps.building import small_map

LOADS = np.array([[50.0, 10, 20, 20], [40, 20, 20, 20]])


def report(width: int = 100, **given: Any) -> str:
    found = small_map([[0, 1], [2, 3]], [[0, 1], [2, 3]], experts=4)
    routing = Routing("decode", LOADS, None, (), "", "decode.json")
    score = score_map(found, [routing], host_of=np.array([0, 0]))
    proof = {"objective": 1.2, "bound": 1.17, "gap": 0.025, "proven": 1} | given
    stream = io.StringIO()
    console = Console(file=stream, width=width, markup=False, highlight=False, emoji=False)
    console.print(placed_report(score=score, **proof))
    return "\n".join(row.rstrip() for row in stream.getvalue().splitlines())


def test_the_score_comes_first_and_then_the_proof() -> None:
    found = report()
    assert found.startswith(
        "expert map found: 2 MoE layers, 4 experts, 4 slots a layer; 2 EP ranks, 1 host\n"
    )
    assert found.endswith(
        "objective 1.2000 x the mean load, bound 1.1700 x the mean load, gap 2.5 %; 1 of 2 layers proven\nwithin 0.1 %"
    )
    for absent in ("moved", "buy", "ended by", "note:"):
        assert absent not in found


def test_modelled_seconds_are_called_modelled() -> None:
    found = report(objective=2.5e-4, bound=2e-4, gap=0.2, unit="s")
    assert "objective 250 us a layer, modelled, bound 200 us a layer, modelled, gap 20 %" in found
    assert "mean load" not in found


def test_what_ended_the_search_is_said() -> None:
    assert "the search was ended by the time limit: more time may find better" in report(
        cut_by="the time limit"
    )


@pytest.mark.parametrize(
    ("moved", "words"),
    [((1, 0), "1 copy inside hosts, 0 between"), ((0, 12345), "0 copies inside hosts, 12,345 between hosts")],
)
def test_copies_moved_are_counted_by_link(moved: tuple[int, int], words: str) -> None:
    assert f"moved: {words}" in report(moved=moved)


def test_what_moves_would_buy_is_a_mean_over_the_layers() -> None:
    found = report(moved=(0, 0), moves=[(0, 3.0), (1500, 2.5)])
    rows = [row.split() for row in found[found.index("what moves would buy") :].splitlines()]
    assert ["0", "1.5000", "x", "the", "mean", "load"] in rows
    assert ["1,500", "1.2500", "x", "the", "mean", "load"] in rows


def test_a_curve_of_one_point_is_no_choice() -> None:
    assert "would buy" not in report(moves=[(0, 3.0)], reach=[(0.9, 2.0)])


@pytest.mark.parametrize("what", ["GPUs", "hosts"])
def test_what_balance_would_buy_names_what_is_reached(what: str) -> None:
    found = report(reach=[(0.99, 3.5), (0.75, 2.125)], reach_of=what)
    assert "what balance would buy" in found
    assert f"{what} per token" in found
    rows = [row.split() for row in found.splitlines()]
    assert ["0.990", "3.500"] in rows
    assert ["0.750", "2.125"] in rows


def test_notes_come_last_and_are_not_taken_for_markup() -> None:
    found = report(notes=("slots [bold]as told", "second"))
    assert found.splitlines()[-2:] == ["note: slots [bold]as told", "note: second"]


def test_everything_together_fits_its_width() -> None:
    found = report(
        width=100, moved=(3, 4), moves=[(0, 3.0), (7, 2.0)], reach=[(0.9, 3.0), (0.8, 2.0)],
        notes=("a note " * 30,), cut_by="the time limit",
    )  # fmt: skip
    assert max(map(len, found.splitlines())) <= 100
