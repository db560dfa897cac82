"""Placements, proofs and refusals in words: small ones that a person can check."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from placer.placement import Placement
from placer.report.terminal import (
    findings_report,
    launchers_report,
    no_placement_report,
    nothing_found_report,
    placement_report,
    progress_line,
)
from placer.strategy import Shape
from tests.launchers.by_hand import make_data

GIB = 2**30


def text(what: RenderableType, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, highlight=False, emoji=False).print(what)
    return "\n".join(row.rstrip() for row in stream.getvalue().splitlines())


def placement(**changes: Any) -> Placement:
    """Return two stages of two ranks, the second one tighter; two scenarios."""
    data = make_data(
        [("node02", 1), ("node02", 0), ("node01", 4), ("node01", 5)],
        [((0, 3), Shape(tp=2)), ((3, 5), Shape(tp=2))],
    )
    parts = {"attention": 10 * GIB, "mlp": 0, "kv_cache": 6 * GIB}
    data["memory"] = [
        {
            "rank": rank,
            "bytes": 16 * GIB,
            "limit_bytes": limit * GIB,
            "parts": parts,
        }
        for rank, limit in enumerate([32, 32, 20, 18])
    ]
    data["latency"] = {
        "prefill": {"total_s": 0.012, "terms": {"attention": 0.010, "tp_all_reduce": 0.002, "experts": 0.0}},
        "decode": {"total_s": 0.003, "terms": {"attention": 0.003, "tp_all_reduce": 0.0, "experts": 0.0}},
    }
    data["certificate"] |= {
        "objective_s": 0.004,
        "bound_s": 0.0039,
        "gap": 0.025,
        "status": "feasible",
        "candidates": 7,
    }
    return Placement.model_validate(data | changes)


EXPECTED = """\
small on two hosts: strategy by hand, 4 ranks on 2 hosts

stages
stage  layers  degrees  ranks  hosts
    0  0-2     TP2      0-1    node02
    1  3-4     TP2      2-3    node01

ranks
rank  host    GPU  stage  dp  tp
   0  node02    1      0   0   0
   1  node02    0      0   0   1
   2  node01    4      1   0   0
   3  node01    5      1   0   1

modelled memory of a GPU, where it is tightest
                 stage 0   stage 1
  attention     10.0 GiB  10.0 GiB
  KV cache       6.0 GiB   6.0 GiB
  total         16.0 GiB  16.0 GiB
  limit         32.0 GiB  18.0 GiB
  filled            50 %      89 %
  tightest GPU  node02/1  node01/5

modelled time of one step
                 prefill  decode
  attention        10 ms    3 ms
  TP all-reduce     2 ms       -
  total            12 ms    3 ms

objective  4 ms      modelled, weighted mean of the scenarios
bound      3.9 ms    proven over all 7 candidate strategies, as modelled
gap        2.5 %     gap over all 7 candidate strategies
status     feasible  holds every requirement; a better one may exist, by at most
                     the gap"""


def test_a_small_placement_is_shown_whole() -> None:
    assert text(placement_report(placement())) == EXPECTED


def test_nothing_is_called_measured_unless_it_says_not() -> None:
    assert "measured" not in text(placement_report(placement()))


def test_a_search_cut_short_says_by_what() -> None:
    certificate = placement().certificate.model_dump() | {"cut_short": True}
    cut = placement(certificate=certificate)
    assert "search cut short by Ctrl-C" in text(placement_report(cut, cut_by="Ctrl-C"))
    assert "search cut short by the time limit or Ctrl-C" in text(placement_report(cut))
    assert "cut short" not in text(placement_report(placement()))


def test_an_optimal_placement_claims_no_more_than_its_candidates() -> None:
    certificate = placement().certificate.model_dump() | {
        "bound_s": 0.004,
        "gap": 0.0,
        "status": "optimal",
        "candidates": 1,
    }
    shown = text(placement_report(placement(certificate=certificate)), width=120)
    assert "gap over the one candidate strategy" in shown
    assert "no placement under those strategies is faster, as modelled" in shown
    assert "a better one may exist" not in shown


def large() -> Placement:
    """Return 64 ranks on 8 hosts: EP 8, TP 2."""
    gpus = [(f"node{number // 8:02d}", number % 8) for number in range(64)]
    slots = {0: [[expert] for expert in range(8)]}
    return Placement.model_validate(make_data(gpus, [((0, 4), Shape(tp=2, dp=32, ep=8, etp=2))], slots))


def test_many_ranks_are_folded_to_a_line_per_host() -> None:
    shown = text(placement_report(large()))
    assert "ranks by host (--all-ranks lists each)" in shown
    row = next(row for row in shown.splitlines() if row.startswith("node03"))
    assert row.split() == ["node03", "0-7", "24-31", "12-15", "0-1", "4-7", "0-1", "1"]
    assert len(shown.splitlines()) < 25


def test_every_rank_is_listed_when_asked() -> None:
    shown = text(placement_report(large(), all_ranks=True))
    assert "--all-ranks" not in shown
    assert [f"{rank:4d}  node" in shown for rank in range(64)] == [True] * 64


def deep() -> Placement:
    """Return eight stages of one rank, each with a limit of its own: 17 GiB for the first, 24 for the last."""
    gpus = [("node01", number) for number in range(8)]
    stages = [((number, number + 1), Shape()) for number in range(8)]
    data = make_data(gpus, stages)
    data["memory"] = [
        {
            "rank": rank,
            "bytes": 16 * GIB,
            "limit_bytes": (17 + rank) * GIB,
            "parts": {"attention": 16 * GIB},
        }
        for rank in range(8)
    ]
    return Placement.model_validate(data)


def test_the_tightest_stages_are_shown_and_the_others_counted() -> None:
    shown = text(placement_report(deep()))
    assert "3 stages fill less of their GPUs (--all-ranks lists them)" in shown
    assert "stage 4" in shown
    assert "stage 5" not in shown
    every = text(placement_report(deep(), all_ranks=True))
    assert "stage 7" in every
    assert "fill less" not in every


def test_like_stages_share_a_column() -> None:
    data = deep().model_dump()
    for record in data["memory"]:
        record["limit_bytes"] = 20 * GIB
    assert "stages 0-7" in text(placement_report(Placement.model_validate(data)))


def test_a_broken_placement_is_shown_without_failing() -> None:
    memory = [{"rank": 0, "bytes": 2**62, "limit_bytes": 0, "parts": {"x": 2**62}}]
    latency = {"a": {"total_s": -1.0, "terms": {"b": 1e300}}}
    broken = placement(memory=memory, latency=latency)
    # As a file could not have it, but an object can.
    broken.memory[0].parts["x\x1b[2J"] = broken.memory[0].parts.pop("x")
    shown = text(placement_report(broken))
    assert "x\\x1b[2J" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_cut_whatever_the_width(width: int) -> None:
    shown = text(placement_report(placement()), width=width)
    assert max(len(row) for row in shown.splitlines()) <= width
    assert "…" not in shown


def test_no_placement_is_told_like_a_proof() -> None:
    told = no_placement_report(
        "m", "c", "p.yaml", ["TP3_PP1 needs 3 GPUs, of which 2 may be used", "tp 4 is odd"]
    )
    assert told.plain == (
        "× No placement of m on c meets every requirement of `p.yaml`\n"
        "╰─▶ Because TP3_PP1 needs 3 GPUs, of which 2 may be used\n"
        "    and because tp 4 is odd"
    )
    nothing = no_placement_report("m", "c", "p.yaml", []).plain
    assert nothing.splitlines()[1] == "╰─▶ Because every strategy is ruled out"


def test_nothing_found_is_not_told_as_a_proof() -> None:
    told = nothing_found_report("Nothing was found within the time limit of 1 s", ["TP1 needs 80 GiB"]).plain
    assert "ruled out: TP1 needs 80 GiB\n" in told
    assert told.endswith("This does not show that no placement exists")
    assert "ruled out" not in nothing_found_report("Nothing was found", []).plain


def test_findings_are_counted() -> None:
    assert text(findings_report(["rank 0: is [nowhere]"])) == "× rank 0: is [nowhere]\n1 finding"


def test_launchers_say_whether_they_can() -> None:
    rows = [("ranks", "rank table", None), ("sglang", "scripts", "hosts differ")]
    shown = text(launchers_report(rows, of_placement=True)).splitlines()
    assert [row.split()[:2] for row in shown] == [["name", "can"], ["ranks", "yes"], ["sglang", "no"]]
    assert "(no: hosts differ)" in shown[2]
    assert "can" not in text(launchers_report(rows[:1], of_placement=False))


@pytest.mark.parametrize(
    ("objective", "bound", "shown"),
    [
        (None, None, "   1.5 s  looking"),
        (None, 0.01, "   1.5 s  bound 10 ms  looking"),
        (0.02, 0.01, "   1.5 s  best 20 ms  bound 10 ms  gap 50 %  looking"),
        (0.02, float("inf"), "   1.5 s  best 20 ms  looking"),
    ],
)
def test_progress_is_one_line(objective: float | None, bound: float | None, shown: str) -> None:
    assert progress_line(1.5, objective, bound, "looking").plain == shown
