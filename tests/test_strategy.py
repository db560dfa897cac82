"""Degrees: names, shapes, and which strategies are tried."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from placer.spec.model import ModelCard, load_model
from placer.spec.reading import read_document
from placer.strategy import (
    MOST_STRATEGIES,
    Shape,
    Strategy,
    StrategyRequest,
    enumerate_strategies,
    parse_strategy_name,
    shape_problem,
    stage_bounds,
)
from tests.shared_data import ROOT


def card(name: str) -> ModelCard:
    return load_model(read_document(ROOT / "models" / f"{name}.yaml"))


DEEPSEEK = card("deepseek-v3")
MIXTRAL = card("mixtral-8x7b")
LLAMA = card("llama-3.1-70b")


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Draw any shape that holds together, of at most some hundred ranks."""
    tp, etp, ep = (draw(st.integers(1, 8)) for _ in range(3))
    small, large = sorted((tp, ep * etp))
    assume(large % small == 0)
    return Shape(tp=tp, dp=draw(st.integers(1, 4)) * large // tp, ep=ep, etp=etp)


# names


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("EP64_TP2_PP1", {"ep": 64, "tp": 2, "pp": 1}),
        ("PP1_TP2_EP64", {"ep": 64, "tp": 2, "pp": 1}),
        ("ep64_tp2_pp1", {"ep": 64, "tp": 2, "pp": 1}),
        (" EP64-TP2 PP1 ", {"ep": 64, "tp": 2, "pp": 1}),
        ("EP64xTP2,PP1", {"ep": 64, "tp": 2, "pp": 1}),
        ("ETP2_EDP4_DP8", {"etp": 2, "edp": 4, "dp": 8}),
        ("TP8", {"tp": 8}),
        (
            "PP3[TP2|EP64_DP64|TP2]",
            {"pp": 3, "stages": [{"tp": 2}, {"ep": 64, "dp": 64}, {"tp": 2}]},
        ),
        ("pp1[tp2]", {"pp": 1, "stages": [{"tp": 2}]}),
    ],
)
def test_names_are_read(text: str, fields: dict[str, Any]) -> None:
    """Degrees in any order, either case, and stage by stage."""
    assert parse_strategy_name(text) == fields
    StrategyRequest.model_validate(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EQ64_TP2", "found 'EQ64' in the strategy 'EQ64_TP2'"),
        ("TPP2", "found 'TPP2'"),
        ("EP", "found 'EP'"),
        ("64EP", "found '64EP'"),
        ("", "found ''"),
        ("EP4__TP2_", "found ''"),
        ("EP4.5", "found 'EP4.5'"),
        ("EP4_EP8", "found EP twice"),
        ("EP٤", "found 'EP٤'"),
        ("TP0", "found TP0 in the strategy 'TP0', expected a degree of at least 1"),
        ("PP2[TP2|PP3]", "found PP inside a stage"),
        ("PP2[TP2|EDP3]", "found EDP inside a stage"),
        ("PP2[TP2|]", "found ''"),
        ("PP2[TP2|[TP2]]", "found 'PP2[TP2|[TP2]]'"),
        ("PP3[TP2|TP2]", "`pp` is 3, but `stages` lists 2"),
        ("PP2[TP4|EP3]", "not a multiple of ep x etp"),
        ("TP5000", "less than or equal to 4096"),
        ("TP9999999", "found 'TP9999999'"),
        ("x" * 10_000, "expected `auto` or degrees such as `EP64_TP2_PP1`"),
    ],
)
def test_names_that_mean_nothing_are_refused(text: str, message: str) -> None:
    """What was found stands in the sentence, cut where it is long."""
    with pytest.raises(ValidationError) as caught:
        StrategyRequest.model_validate(text)
    said = caught.value.errors()[0]
    assert message in str(said.get("ctx", {}).get("error", said["msg"]))
    assert len(said["msg"]) < 400


def test_the_nearest_degree_is_suggested() -> None:
    """A slip of the finger gets a hint."""
    with pytest.raises(ValueError, match=re.escape("(known: EP, ETP, EDP, TP, DP, PP), did you mean `ETP`?")):
        parse_strategy_name("ETTP")


def test_auto_fixes_nothing() -> None:
    """`auto` in any case is the empty request."""
    for word in ("auto", " AUTO "):
        request = StrategyRequest.model_validate(word)
        assert request == StrategyRequest()
        assert (request.kind, request.name()) == ("auto", "auto")
    assert StrategyRequest.model_validate("TP2").kind == "partly fixed"
    assert StrategyRequest.model_validate("PP1[TP2]").kind == "fixed"


@pytest.mark.parametrize(
    ("stages", "name"),
    [
        ([Shape(tp=2, dp=32, ep=64)], "EP64_TP2_DP32_PP1"),
        ([Shape()], "TP1_PP1"),
        ([Shape(tp=4, dp=2, ep=2, etp=4)] * 3, "EP2_ETP4_TP4_DP2_PP3"),
        ([Shape(tp=2), Shape(tp=1, dp=64, ep=64), Shape(tp=2)], "PP3[TP2|EP64_TP1_DP64|TP2]"),
    ],
)
def test_strategies_are_named(stages: list[Shape], name: str) -> None:
    """One word for like stages, stage by stage otherwise."""
    assert Strategy(tuple(stages)).name() == name


@given(st.lists(shapes(), min_size=1, max_size=4))
def test_the_name_of_a_strategy_reads_back_as_that_strategy(stages: list[Shape]) -> None:
    """Degrees that a name leaves out are 1; with that it tells the strategy, and its request allows it."""
    strategy = Strategy(tuple(stages))
    request = StrategyRequest.model_validate(strategy.name())
    if request.stages is not None:
        assert tuple(stage.shape() for stage in request.stages) == strategy.stages
    else:
        fields = parse_strategy_name(strategy.name())
        pp = fields.pop("pp")
        assert (Shape(**fields),) * pp == strategy.stages
        assert request.pp == len(stages)
        assert request.allows(stages[0])


@given(st.lists(shapes(), min_size=1, max_size=4))
def test_the_name_of_a_request_by_stages_reads_back_equal(stages: list[Shape]) -> None:
    """Like stages too: a word for all stages at once would leave degrees open that were fixed."""
    listed = [{"tp": shape.tp, "dp": shape.dp, "ep": shape.ep, "etp": shape.etp} for shape in stages]
    request = StrategyRequest.model_validate({"stages": listed})
    again = StrategyRequest.model_validate(request.name())
    assert again.stages == request.stages


@given(
    st.fixed_dictionaries(
        {}, optional={name: st.integers(1, 4096) for name in ("pp", "tp", "dp", "ep", "etp", "edp")}
    )
)
def test_the_name_of_a_request_by_degrees_reads_back_equal(fields: dict[str, int]) -> None:
    """Every choice of fixed degrees."""
    request = StrategyRequest.model_validate(fields)
    assert StrategyRequest.model_validate(request.name()) == request


def test_degrees_beside_stages_are_refused() -> None:
    """There is one place to say it."""
    with pytest.raises(ValidationError, match="states `tp` beside `stages`"):
        StrategyRequest.model_validate({"tp": 2, "stages": [{"tp": 2}]})


# shapes


@given(shapes())
def test_both_views_of_a_stage_number_its_ranks(shape: Shape) -> None:
    """(dp, tp) and (edp, ep, etp) each name every rank once, in the order of the rank numbers."""
    assert shape.tp * shape.dp == shape.ep * shape.etp * shape.edp == shape.ranks
    assert shape.block * shape.blocks == shape.ranks
    columns = shape.coordinates()
    ranks = np.arange(shape.ranks)
    assert np.array_equal(columns["dp"] * shape.tp + columns["tp"], ranks)
    assert np.array_equal((columns["edp"] * shape.ep + columns["ep"]) * shape.etp + columns["etp"], ranks)
    for name, size in (
        ("tp", shape.tp),
        ("dp", shape.dp),
        ("ep", shape.ep),
        ("etp", shape.etp),
        ("edp", shape.edp),
    ):
        assert set(columns[name].tolist()) == set(range(size))


@given(shapes())
def test_one_group_lies_inside_the_other(shape: Shape) -> None:
    """No EP group holds a part of a TP group only."""
    columns = shape.coordinates()
    small, large = columns["dp"], columns["edp"]
    if shape.tp > shape.ep_group:
        small, large = large, small
    assert all(len(set(large[small == number].tolist())) == 1 for number in set(small.tolist()))


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 2, "dp": 3, "ep": 4}, "tp x dp = 2 x 3 = 6 ranks are not a multiple of ep x etp = 4 x 1 = 4"),
        ({"tp": 4, "dp": 3, "ep": 6}, "a TP group of 4 ranks and an EP group of 6 overlap in part"),
        ({"tp": 2, "dp": 3, "ep": 3}, "overlap in part"),
        ({"tp": 0}, "whole numbers from 1"),
        ({"tp": 2, "dp": -1}, "whole numbers from 1"),
    ],
)
def test_shapes_that_do_not_hold_together_are_refused(degrees: dict[str, int], message: str) -> None:
    """Ranks that do not divide, and groups that overlap in part."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Shape(**degrees)


def test_layer_counts_become_ranges() -> None:
    """Half-open, a stage without layers included."""
    assert stage_bounds([3, 0, 2]) == [(0, 3), (3, 3), (3, 5)]


@pytest.mark.parametrize(
    ("model", "shape", "slots", "reason"),
    [
        (DEEPSEEK, Shape(tp=3), 256, "tp 3 does not divide the 128 attention heads"),
        (DEEPSEEK, Shape(dp=3, ep=3), 256, "ep 3 does not divide the 256 expert slots"),
        (DEEPSEEK, Shape(dp=3, ep=3), 288, None),
        (DEEPSEEK, Shape(), 257, "would put two copies of one of 256 experts on one GPU"),
        (DEEPSEEK, Shape(tp=6, etp=6), 256, "tp 6 does not divide"),
        (DEEPSEEK, Shape(dp=3, etp=3), 256, "etp 3 does not divide the expert width 2048"),
        (LLAMA, Shape(dp=2, ep=2), 0, "the model has no experts, so ep and etp must be 1"),
        (LLAMA, Shape(dp=2, etp=2), 0, "the model has no experts, so ep and etp must be 1"),
        (LLAMA, Shape(tp=16), 0, None),
        (LLAMA, Shape(tp=8), 0, None),
    ],
)
def test_what_a_model_can_be_split_by(model: ModelCard, shape: Shape, slots: int, reason: str | None) -> None:
    """The reason names the degree and what it does not divide."""
    found = shape_problem(model, shape, slots)
    assert found is None if reason is None else reason in (found or "")


def test_key_value_heads_are_split_or_copied_whole() -> None:
    """24 heads over 6 ranks, but 4 key/value heads neither divide by 6 nor into 6."""
    data = read_document(ROOT / "models" / "llama-3.1-70b.yaml").data
    data["groups"][0]["attention"] |= {"heads": 24, "kv_heads": 4}
    model = ModelCard.model_validate(data)
    assert "neither divides the 4 key/value heads" in (shape_problem(model, Shape(tp=6), 0) or "")
    assert shape_problem(model, Shape(tp=8), 0) is None


# enumeration


def tried(model: ModelCard, gpus: int, word: str | dict[str, Any] = "auto", spare: int = 0) -> list[Strategy]:
    slots = model.moe.experts + spare if model.moe else 0
    return list(enumerate_strategies(model, StrategyRequest.model_validate(word), gpus, slots))


@pytest.mark.parametrize("gpus", [1, 8, 14, 64, 72, 128, 512])
@pytest.mark.parametrize(
    ("model", "spare"),
    [(DEEPSEEK, 0), (DEEPSEEK, 32), (MIXTRAL, 0), (LLAMA, 0)],
    ids=lambda item: getattr(item, "name", item),
)
@pytest.mark.parametrize("word", ["auto", "PP2", "TP2", "EP8", "EP8_TP4", "EDP2", "DP4", "ETP2"])
def test_what_is_tried_is_allowed(model: ModelCard, spare: int, gpus: int, word: str) -> None:
    """Every strategy fits the GPUs, divides the model and agrees with the request; none is tried twice."""
    found = tried(model, gpus, word, spare)
    request = StrategyRequest.model_validate(word)
    slots = model.moe.experts + spare if model.moe else 0
    assert len(set(found)) == len(found) <= MOST_STRATEGIES
    assert all(strategy.uniform and strategy.ranks <= gpus for strategy in found)
    assert all(request.pp in (None, len(strategy.stages)) for strategy in found)
    for shape in {strategy.stages[0] for strategy in found}:
        assert shape_problem(model, shape, slots) is None
        assert request.allows(shape)


@pytest.mark.parametrize(
    ("model", "gpus", "spare", "names"),
    [
        (
            MIXTRAL,
            8,
            0,
            ["EP8_TP1_DP8_PP1", "TP8_PP1", "EP8_TP8_PP1", "ETP8_TP8_PP1", "TP4_PP2", "EP4_TP4_PP2"],
        ),
        (DEEPSEEK, 8, 0, ["EP8_TP1_DP8_PP1", "EP8_TP8_PP1", "EP8_ETP1_TP8_PP1", "TP1_DP8_PP1"]),
        (MIXTRAL, 14, 0, ["EP2_ETP2_TP2_DP6_PP1", "EP4_TP4_DP3_PP1"]),
        (DEEPSEEK, 64, 0, ["EP64_TP1_DP64_PP1", "EP64_TP2_DP32_PP1", "EP32_TP1_DP32_PP2", "EP8_TP8_PP8"]),
        (DEEPSEEK, 72, 32, ["EP72_TP1_DP72_PP1", "EP36_TP1_DP36_PP2", "EP72_TP4_DP18_PP1"]),
        (DEEPSEEK, 512, 0, ["EP256_TP1_DP256_PP1", "EP256_TP2_DP256_PP1", "EP32_TP8_DP4_PP16"]),
        (LLAMA, 8, 0, ["TP8_PP1", "TP4_DP2_PP1", "TP2_PP4", "TP1_DP8_PP1", "TP1_PP8"]),
        (LLAMA, 64, 0, ["TP8_DP8_PP1", "TP8_PP8"]),
    ],
)
def test_the_obvious_strategies_are_tried(model: ModelCard, gpus: int, spare: int, names: list[str]) -> None:
    """What an engineer would try first is among them."""
    found = {strategy.name() for strategy in tried(model, gpus, spare=spare)}
    wanted = {name.replace("_ETP1", "") for name in names}
    assert wanted <= found, wanted - found


@pytest.mark.parametrize(
    ("model", "gpus", "word", "count"),
    [
        (MIXTRAL, 1, "auto", 1),
        (MIXTRAL, 8, "EP8_ETP1_TP1_DP8_PP1", 1),
        (MIXTRAL, 7, "EP8_ETP1_TP1_DP8_PP1", 0),
        (MIXTRAL, 8, "EP3", 0),
        (MIXTRAL, 8, "PP9", 0),
        (MIXTRAL, 0, "auto", 0),
        (LLAMA, 8, "EP2", 0),
    ],
)
def test_how_many_are_tried(model: ModelCard, gpus: int, word: str, count: int) -> None:
    """One where all is fixed, none where nothing fits."""
    assert len(tried(model, gpus, word)) == count


def test_every_degree_up_to_the_stated_ones_is_tried_on_a_small_cluster() -> None:
    """The set that the docstring promises: pp to 16 and powers of two, dp to 8 and the most that fits."""
    found = tried(LLAMA, 64)
    assert {len(strategy.stages) for strategy in found} == {*range(1, 17), 32, 64}
    single = {strategy.stages[0] for strategy in found if len(strategy.stages) == 1}
    assert {shape.dp for shape in single if shape.tp == 1} == {1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64}
    assert {shape.tp for shape in single} == {1, 2, 4, 8, 16, 32, 64}
    assert max(len(strategy.stages) for strategy in tried(LLAMA, 4096)) == 64


def test_pipelines_are_never_longer_than_the_model() -> None:
    """A stage of its own for every layer is the end of it."""
    data = read_document(ROOT / "models" / "llama-3.1-70b.yaml").data
    data["groups"][0]["layers"] = "0-2"
    assert {len(item.stages) for item in tried(ModelCard.model_validate(data), 64)} == {1, 2, 3}


def test_stages_that_are_listed_are_the_one_strategy() -> None:
    """No search where every stage is fixed, whether it fits or not."""
    found = tried(DEEPSEEK, 4, "PP3[TP2|EP64_DP64|TP2]")
    assert [strategy.name() for strategy in found] == ["PP3[TP2|EP64_TP1_DP64|TP2]"]


@pytest.mark.parametrize("spare", [0, 32])
@pytest.mark.parametrize("gpus", [8, 64, 72, 128, 256, 512, 1024, 2048])
def test_there_are_never_too_many(gpus: int, spare: int) -> None:
    """The search refuses more than 4,000, so a large cluster is tried less finely, but still broadly."""
    found = tried(DEEPSEEK, gpus, spare=spare)
    assert 50 <= len(found) < 4000
    assert max(strategy.ranks for strategy in found) > gpus * 0.9


@settings(max_examples=60, deadline=None)
@given(*[st.sampled_from([1, 2, 4, 8])] * 4, st.integers(1, 4))
def test_a_fully_fixed_request_gives_that_strategy(tp: int, ep: int, etp: int, copies: int, pp: int) -> None:
    """Whatever shape is asked for is tried, where the model can be split so."""
    shape = Shape(tp=tp, dp=copies * max(tp, ep * etp) // tp, ep=ep, etp=etp)
    request = StrategyRequest(pp=pp, tp=tp, dp=shape.dp, ep=ep, etp=etp)
    found = list(enumerate_strategies(DEEPSEEK, request, shape.ranks * pp, 256))
    assert found == [Strategy((shape,) * pp)]
