"""Explanations as text: what stands in each line, held against texts written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from textwrap import dedent

import pytest

from placer.report.explanation import MANY, Condition, Edit, Explanation, WayOut, explanation_report

MAX_GPUS = Condition("max_gpus", "8", "p.yaml:7", "`max_gpus: 8` allows 8 of 64 free GPUs")
RESERVE = Condition("memory_reserve", "10 %", "by default", "`memory_reserve: 10 %` keeps that share free")
PIN = Condition("pin_ranks.0", "gpu01", "p.yaml:12", "`pin_ranks.0` puts rank 0 on gpu01")
MORE_GPUS = Edit("max_gpus", "8", "10", "p.yaml:7")
NO_PIN = Edit("pin_ranks.0", "gpu01", None, "p.yaml:12")
WAY = WayOut((MORE_GPUS,), "TP1_PP10", 10, {"decode": 0.2906}, True)
TOLD = Explanation(
    status="infeasible",
    problem="p",
    model="small",
    cluster="two-hosts",
    file="p.yaml",
    sentence="Because small needs more, no placement exists",
    conflict=(MAX_GPUS,),
    minimal=True,
    proof="counting",
    ways=(WAY,),
    seconds=0.44,
)


def text(**changes: object) -> str:
    """Return the report of the explanation above with some parts changed."""
    return explanation_report(replace(TOLD, **changes)).plain + "\n"  # type: ignore[arg-type]


def test_one_condition() -> None:
    """A conflict of one: why, the condition with its place, the edit with what it leads to, the proof."""
    assert text() == dedent(
        """\
        × No placement of small on two-hosts meets every requirement of `p.yaml`
        ╰─▶ Because small needs more, no placement exists

        This cannot hold by itself, given the model, the cluster and the work:
          max_gpus  8  p.yaml:7

        hint: change `max_gpus` from 8 to 10
              then TP1_PP10 on 10 GPUs is a placement: decode 290.6 ms, modelled
        proven by counting; 0.4 s
        """
    )


def test_several_conditions_and_a_default() -> None:
    """Conditions stand in columns; one that nobody stated is said to hold by default."""
    assert text(conflict=(MAX_GPUS, RESERVE, PIN)) == dedent(
        """\
        × No placement of small on two-hosts meets every requirement of `p.yaml`
        ╰─▶ Because small needs more, no placement exists

        These 3 cannot hold together; without any one of them the rest can:
          max_gpus        8      p.yaml:7
          memory_reserve  10 %   by default
          pin_ranks.0     gpu01  p.yaml:12

        hint: change `max_gpus` from 8 to 10
              then TP1_PP10 on 10 GPUs is a placement: decode 290.6 ms, modelled
        proven by counting; 0.4 s
        """
    )


def test_edits_that_are_made_together() -> None:
    """Edits of one way out stand in one line; a condition to take out is dropped, with what it stated."""
    way = WayOut((MORE_GPUS, NO_PIN), "EP4_TP1_DP4_PP1", 1024, {"a": 1e-3, "b": 2.5}, False, "costs 3 us")
    rows = text(ways=(way, WAY)).splitlines()
    assert rows[-5:-1] == [
        "hint: change `max_gpus` from 8 to 10 and drop `pin_ranks.0` (gpu01)",
        "      then EP4_TP1_DP4_PP1 on 1,024 GPUs is a placement: a 1 ms, b 2.5 s, modelled; "
        "a smaller change may do; costs 3 us",
        "hint: change `max_gpus` from 8 to 10",
        "      then TP1_PP10 on 10 GPUs is a placement: decode 290.6 ms, modelled",
    ]


def test_no_way_out() -> None:
    """That none was found is said, and not that there is none."""
    told = text(ways=())
    assert "\nno way out was found and verified in the time\n" in told
    assert "hint" not in told


def test_a_conflict_that_was_not_shown_to_be_the_smallest() -> None:
    """Then that is said, with the conditions in doubt, and nothing of what the rest can do."""
    told = text(conflict=(MAX_GPUS, PIN), minimal=False, unproven=("max_gpus", "pin_ranks.0"))
    assert (
        "These 2 cannot hold together (not shown to be the fewest: nothing was decided without `max_gpus`, "
        "`pin_ranks.0`):"
    ) in told
    assert "the rest can" not in told


def test_nothing_that_was_asked_is_in_conflict() -> None:
    """Where no condition takes part, it is the model and the cluster."""
    told = text(conflict=(), ways=())
    assert "\nThe model and the cluster alone are in conflict: nothing that the file asks for" in told
    assert "cannot hold" not in told


@pytest.mark.parametrize(
    ("strategies", "covers"),
    [
        (0, ""),
        (1, " for the one strategy there is to try"),
        (1880, " for each of the 1,880 strategies of like stages"),
    ],
)
def test_what_a_proof_covers(strategies: int, covers: str) -> None:
    """The last line says whether the proof is for any strategy or for so many."""
    assert text(strategies=strategies).splitlines()[-1] == f"proven by counting{covers}; 0.4 s"


def test_a_proof_about_some_strategies_says_so() -> None:
    """Where degrees were thinned out, the last line says that others may do."""
    last = text(strategies=1880, thinned=True).splitlines()[-1]
    assert "for each of the 1,880 strategies that are tried" in last
    assert "others may do" in last


def pins(count: int) -> tuple[Condition, ...]:
    return tuple(
        Condition(f"pin_ranks.{n}", f"gpu{n:02d}", f"p.yaml:{n + 20}", "a phrase") for n in range(count)
    )


def test_many_conditions_of_a_kind_are_told_in_one_row() -> None:
    """Up to eight entries of a kind stand one by one; more are counted, with the first and the last."""
    assert MANY == 8
    few = text(conflict=(MAX_GPUS, *pins(8))).splitlines()
    assert few[3] == "These 9 cannot hold together; without any one of them the rest can:"
    assert few[4:7] == [
        "  max_gpus     8      p.yaml:7",
        "  pin_ranks.0  gpu00  p.yaml:20",
        "  pin_ranks.1  gpu01  p.yaml:21",
    ]
    assert sum(row.startswith("  pin_ranks") for row in few) == 8
    many = text(conflict=(MAX_GPUS, *pins(9))).splitlines()
    assert many[3] == "These 10 cannot hold together; without any one of them the rest can:"
    assert [row.split() for row in many[4:7]] == [
        ["max_gpus", "8", "p.yaml:7"],
        ["pin_ranks:", "9", "entries,", "pin_ranks.0", "to", "pin_ranks.8", "p.yaml:20"],
        [],
    ]


def test_entries_of_lists_are_one_kind() -> None:
    """Entries such as `pin_experts[3]` are counted like those of a mapping."""
    entries = tuple(Condition(f"pin_experts[{n}]", "x", "p.yaml:9", "a phrase") for n in range(12))
    rows = text(conflict=entries).splitlines()
    assert rows[4].split() == [
        "pin_experts:",
        "12",
        "entries,",
        "pin_experts[0]",
        "to",
        "pin_experts[11]",
        "p.yaml:9",
    ]


def test_undecided() -> None:
    """What was left open is told before what was ruled out, a few clauses of each, and that it is no proof."""
    reasons = tuple(f"TP{n} does not fit" for n in range(7))
    told = text(status="undecided", reasons=reasons, undecided=tuple("abcde"))
    rows = told.splitlines()
    assert rows[:-1] == [
        "? Not decided whether small has a placement on two-hosts under `p.yaml`",
        "  not decided: a",
        "  not decided: b",
        "  not decided: c",
        "  ruled out: TP0 does not fit",
        "  ruled out: TP1 does not fit",
        "  ruled out: TP2 does not fit",
        "  ruled out: TP3 does not fit",
    ]
    assert rows[-1].startswith("This is not a proof that none exists")


def test_feasible() -> None:
    """The placement that was found is told with its steps, as modelled and not the best."""
    assert text(
        status="feasible", strategy="EP8_TP1_DP8_PP1", gpus=1000, steps={"prefill": 0.0212, "decode": 8e-6}
    ) == (
        "A placement exists for small on two-hosts: EP8_TP1_DP8_PP1 on 1,000 GPUs, prefill 21.2 ms, decode 8 us "
        "(modelled; the first one found and verified, not the best: `placer solve` looks for that)\n"
    )


@pytest.mark.parametrize("status", ["feasible", "infeasible", "undecided"])
def test_the_text_has_no_end_of_sentence_nor_blank_ends(status: str) -> None:
    """Lines end without a full stop and without blanks."""
    for row in text(status=status, strategy="TP1_PP1", conflict=(MAX_GPUS, *pins(9))).splitlines():
        assert row == row.rstrip()
        assert not row.endswith(".")


def test_json_has_every_part() -> None:
    """As data it is plain: what `json` writes is what was there."""
    data = json.loads(json.dumps(TOLD.as_json()))
    assert data["conflict"] == [
        {"key": "max_gpus", "value": "8", "where": "p.yaml:7", "phrase": MAX_GPUS.phrase}
    ]
    assert data["ways"] == [
        {
            "edits": [{"key": "max_gpus", "old": "8", "new": "10", "where": "p.yaml:7"}],
            "strategy": "TP1_PP10",
            "gpus": 10,
            "steps": {"decode": 0.2906},
            "smallest": True,
            "note": "",
        }
    ]
    assert set(data) == set(Explanation.__dataclass_fields__)
